"""From settings to a network."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from cge_fast import backbones, model
from cge_fast.errors import UserError
from cge_fast.options import DataConfig, LossConfig, ModelConfig, TrainConfig, read_settings, to_yaml


def build(settings: ModelConfig, height: int = 32, width: int = 16) -> model.ReidModel:
    return model.build(settings, LossConfig(), DataConfig(height=height, width=width), 3, 2, torch.float32, "reference")


def test_the_settings_reach_the_backbone(tmp_path):
    weights = backbones.build("compact").state_dict()
    torch.save(weights, tmp_path / "w.pth")
    network = build(ModelConfig(weights=tmp_path / "w.pth", non_local="half", map_norm=True))
    names = dict(network.backbone.named_children())
    assert list(names) == ["0", "1", "2", "non_local_2", "3", "non_local_3", "map_norm"]
    assert names["non_local_3"].theta.out_channels == 64
    assert torch.equal(network.backbone[0][0].weight, weights["0.0.weight"])
    assert network(torch.rand(2, 3, 32, 16), torch.tensor([0, 1])).loss.isfinite()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_ibn_and_non_local_blocks_train_in_the_chosen_precision(precision):
    settings = ModelConfig(backbone="resnet50_ibn_a", non_local="one", stripes=1)
    network = build(settings)
    network.precision = precision
    network(torch.rand(2, 3, 32, 16), torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in network.backbone.parameters())


def test_pretrained_and_weights_exclude_each_other():
    with pytest.raises(UserError, match=r"model\.weights: w\.pth .* model\.pretrained"):
        build(ModelConfig(backbone="resnet18", pretrained=True, weights=Path("w.pth")))


def test_the_settings_file_keeps_them(tmp_path):
    config = TrainConfig(
        data=DataConfig(normalisation="luperson", erased="mean", erasing_area=0.33),
        model=ModelConfig(weights=Path("w.pth"), non_local="one", map_norm=True),
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_settings(tmp_path / "config.yaml") == config


def test_settings_from_before_they_existed_are_as_they_were(tmp_path):
    values = yaml.safe_load(to_yaml(TrainConfig()))
    for section, keys in (
        ("data", ("normalisation", "erased", "erasing_area")),
        ("model", ("weights", "non_local", "map_norm")),
    ):
        for key in keys:
            del values[section][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert asdict(read_settings(tmp_path / "config.yaml")) == asdict(TrainConfig()) | {
        "data": asdict(DataConfig(normalisation="imagenet", erased="zero", erasing_area=0.4)),
        "model": asdict(ModelConfig(weights=None, non_local="none", map_norm=False)),
    }

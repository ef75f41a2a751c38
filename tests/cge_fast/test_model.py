"""From settings to a network."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from cge_fast import CGELoss, ReidModel, backbones
from cge_fast.build import build_model
from cge_fast.cli import read_settings, to_yaml
from cge_fast.errors import UserError
from cge_fast.options import DataConfig, ModelConfig, TrainConfig


def build(settings: ModelConfig, precision: torch.dtype = torch.float32) -> ReidModel:
    return build_model(TrainConfig(model=settings), DataConfig(height=32, width=16), precision)


def loss_of(model: ReidModel) -> torch.Tensor:
    embeddings = model(torch.rand(2, 3, 32, 16))
    return CGELoss(model.neck.num_features, 3, stripes=model.pool.stripes)(embeddings, torch.tensor([0, 1])).loss


def test_the_settings_reach_the_backbone(tmp_path):
    weights = backbones.build("compact").state_dict()
    torch.save(weights, tmp_path / "w.pth")
    network = build(ModelConfig(weights=tmp_path / "w.pth", non_local="half", map_norm=True))
    names = dict(network.backbone.named_children())
    assert list(names) == ["0", "1", "2", "non_local_2", "3", "non_local_3", "map_norm"]
    assert names["non_local_3"].theta.out_channels == 64
    assert torch.equal(network.backbone[0][0].weight, weights["0.0.weight"])
    assert loss_of(network).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_ibn_and_non_local_blocks_train_in_the_chosen_precision(precision):
    settings = ModelConfig(backbone="resnet50_ibn_a", non_local="one", stripes=1)
    network = build(settings, precision)
    loss_of(network).backward()
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


def test_the_model_knows_nothing_of_identities_and_gives_float32():
    model = build(ModelConfig(pooling="gem"), torch.bfloat16)
    embeddings = model.eval()(torch.rand(2, 3, 32, 16))
    assert {embeddings.pooled.dtype, embeddings.stripes.dtype, embeddings.embedding.dtype} == {torch.float32}
    assert embeddings.stripes.shape == (2, 3, 128)
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "pool", "neck"}
    assert model.embed(torch.rand(2, 3, 32, 16)).shape == (2, 128)


@pytest.mark.parametrize("learned", [True, False])
def test_gems_exponent_is_learned_or_stays(learned):
    model = build(ModelConfig(pooling="gem", gem_learned=learned))
    before = model.pool.p.item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=5e-4)
    loss_of(model).backward()
    optimizer.step()
    assert (model.pool.p.item() != before) == learned


def test_the_embedding_in_use_is_that_of_training():
    model, images = build(ModelConfig()).eval(), torch.rand(2, 3, 32, 16)
    torch.testing.assert_close(model.embed(images), model(images).embedding)
    torch.testing.assert_close(model.embed(images, after_neck=False), model(images).pooled)

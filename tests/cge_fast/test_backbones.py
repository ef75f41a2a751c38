"""Backbones: shapes, and weights that cannot be had."""

import pytest
import torch

from cge_fast import backbones
from cge_fast.errors import UserError


@pytest.mark.parametrize(
    ("name", "channels", "height", "width"),
    [("compact", 128, 12, 6), ("resnet18", 512, 6, 3), ("resnet34", 512, 6, 3), ("resnet50", 2048, 6, 3)],
)
def test_the_feature_map_has_stride_8_or_16(name, channels, height, width):
    backbone = backbones.build(name, pretrained=False)
    assert backbones.map_size(backbone, 96, 48) == (channels, height, width)


def test_looking_at_the_map_size_changes_nothing():
    backbone = backbones.build("compact", pretrained=False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbones.map_size(backbone, 24, 16)
    assert backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_weights_that_cannot_be_fetched_say_where_to_place_them(monkeypatch, tmp_path):
    torch.hub.set_dir(tmp_path)

    def no_network(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"could not be had .*Name or service.* place that file at .*resnet18-.*\.pth"):
        backbones.build("resnet18", pretrained=True)

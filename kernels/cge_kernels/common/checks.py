"""Argument checks shared by the operators: one line that names the argument, what came and what is wanted."""

from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.dispatch import is_traced
from cge_kernels.common.launch import host_may_look

INTEGERS = torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64


def require_tensor(name: str, value: Any, shape: str, dtypes: str = "a floating") -> Tensor:
    """Returns `value` if it is a tensor of as many dimensions as `shape` (as in "(B, n, C)") has letters.

    dtypes: "a floating" or "an integer".
    Raises TypeError for another type or dtype, ValueError for another rank.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    if value.dim() != shape.count(",") + 1 - shape.count(",)"):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (value.is_floating_point() if dtypes == "a floating" else is_integer):
        raise TypeError(f"{name} must have {dtypes} dtype, got {value.dtype}")
    return value


def require_shape(name: str, value: Tensor, wanted: tuple[int, ...], because: str) -> None:
    """Raises ValueError unless `value` has the shape `wanted`, which follows from `because`."""
    if tuple(value.shape) != wanted:
        raise ValueError(f"{name} must have shape {wanted} to fit {because}, got {tuple(value.shape)}")


def as_int64(labels: Any) -> Any:
    """Labels of any integer dtype as int64, in which no class is out of range; anything else as it came."""
    is_integer = isinstance(labels, Tensor) and labels.dtype in INTEGERS
    return labels.long() if is_integer else labels


def require_same_device(**tensors: Tensor) -> None:
    """Raises ValueError unless all tensors lie on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            "all tensors must lie on one device, got " + ", ".join(f"{k} on {v}" for k, v in devices.items())
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises ValueError if a label is outside [0, classes), where `host_may_look` at it."""
    if is_traced(labels):
        valid_labels(labels, classes)
    else:
        look_at_labels(labels, classes)


def look_at_labels(labels: Tensor, classes: int) -> None:
    """`check_labels`, out of a tracer's sight."""
    wrong = [label for label in labels.tolist() if not 0 <= label < classes] if host_may_look(labels) else []
    if wrong:
        raise ValueError(f"labels must lie in [0, {classes}), got {wrong[0]}")


def where_valid(values: Tensor, labels: Tensor, classes: int, otherwise: float) -> Tensor:
    """(B,): the values of samples whose label lies in [0, classes), and `otherwise` for others.

    Where `check_labels` has looked there are no others, and nothing is computed.
    """
    if host_may_look(labels) and not is_traced(labels):
        return values
    return torch.where((labels >= 0) & (labels < classes), values, otherwise)


@torch.library.custom_op("cge_kernels::valid_labels", mutates_args=())
def valid_labels(labels: Tensor, classes: int) -> Tensor:
    """(B,) bool: which labels lie in [0, classes).

    On the CPU a label outside is a ValueError; on a GPU the caller masks the sample. Opaque, since torch.compile could
    not trace the look.
    """
    look_at_labels(labels, classes)
    return (labels >= 0) & (labels < classes)


@valid_labels.register_fake
def _(labels, classes):
    return torch.empty_like(labels, dtype=torch.bool)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: the dtype in which statistics and sums are kept."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def require_memory(name: str, memory: Tensor) -> None:
    """Raises unless `memory` is a contiguous floating tensor (n, N, C)."""
    require_tensor(name, memory, "(n, N, C)")
    if 0 in memory.shape:
        raise ValueError(f"{name} must have no empty dimension, got {tuple(memory.shape)}")
    if not memory.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {memory.stride()} for shape {tuple(memory.shape)}")


def check_local(local_features: Tensor, memory: Tensor) -> None:
    """Raises unless these are local features (B, n, C) and a memory (n, N, C) that fit each other, on one device."""
    require_tensor("local_features", local_features, "(B, n, C)")
    require_memory("memory", memory)
    require_same_device(local_features=local_features, memory=memory)
    _, stripes, channels = local_features.shape
    fitting = f"local_features {tuple(local_features.shape)}"
    require_shape("memory", memory, (stripes, memory.shape[1], channels), fitting)

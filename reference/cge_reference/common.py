"""What the operators share."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: the dtype in which statistics and sums are kept."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def without_autocast(operator: Callable[P, R]) -> Callable[P, R]:
    """Runs an operator with autocast off: its dtypes follow from its arguments alone."""

    @wraps(operator)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not torch.is_autocast_enabled(device):  # so that an exported graph has no region for it
            return operator(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return operator(*args, **kwargs)

    return wrapper

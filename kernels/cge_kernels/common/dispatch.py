"""The one place that decides where an operator runs: as Triton kernels or as ATen operations."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.device_functions import triton
from cge_kernels.common.launch import kernels_can_run_on_cpu

BACKENDS = ("auto", "triton", "aten")

_override: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, operators run on "triton", on "aten", or where their tensors suggest ("auto"), whatever CGE_BACKEND says.

    Raises:
        ValueError: another name.
    """
    global _override
    require_backend("backend", name)
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def require_backend(source: str, name: str) -> None:
    """Raises ValueError, naming the source, unless `name` is a backend."""
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")


def runs_on_triton(*tensors: Tensor) -> bool:
    """Whether an operator on these tensors runs as Triton kernels: auto means yes on a GPU, but for float64.

    Raises:
        ValueError: CGE_BACKEND holds another name.
        RuntimeError: Triton was asked for but is not installed, or has nothing to run CPU tensors on.
        TypeError: Triton was asked for with float64.
    """
    chosen = _override or os.environ.get("CGE_BACKEND", "auto")
    require_backend("CGE_BACKEND", chosen)
    device = tensors[0].device.type
    is_float64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    if chosen != "triton":
        return chosen == "auto" and device == "cuda" and triton is not None and not is_float64
    if triton is None:
        raise RuntimeError("CGE_BACKEND is triton, but Triton is not installed")
    if is_float64:
        raise TypeError("CGE_BACKEND is triton, whose kernels know no float64; use aten")
    if device == "cpu" and not kernels_can_run_on_cpu():
        raise RuntimeError(
            "CGE_BACKEND is triton, but the tensors are on the CPU: set TRITON_INTERPRET=1 before importing "
            "cge_kernels, or take the launches with cge_kernels.launching"
        )
    return True


def implementation(on_triton: Callable, on_aten: Callable, *tensors: Tensor) -> Callable:
    """One of two functions, wrapped to run with autocast off: dtypes follow from the arguments alone."""
    chosen = on_triton if runs_on_triton(*tensors) else on_aten

    def call(*arguments: Any) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return chosen(*arguments)

    return call

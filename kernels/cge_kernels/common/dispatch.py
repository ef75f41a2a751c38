"""The one place that decides where an operator runs: Triton kernels, the CPU's implementation, or the reference."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cge_kernels.common.device_functions import triton
from cge_kernels.common.launch import kernels_can_run_on_cpu

BACKENDS = ("auto", "triton", "cpu", "reference")

PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)}

_override: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, every operator runs on this backend, whatever CGE_BACKEND says.

    "auto": Triton kernels for GPU tensors, cache-blocked PyTorch for CPU tensors. "triton": the kernels. "cpu":
    cache-blocked PyTorch, on any device. "reference": cge_reference, with plain autograd.

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
    if name == "aten":
        raise ValueError(f"{source}: 'aten' is now called 'cpu'")
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")


def current_backend() -> str:
    """The backend in force: that of `backend`, else CGE_BACKEND, else "auto"."""
    if _override is not None:
        return _override
    name = os.environ.get("CGE_BACKEND", "auto")
    require_backend("CGE_BACKEND", name)
    return name


def runs_on_reference() -> bool:
    """Whether operators run as cge_reference has them."""
    return current_backend() == "reference"


def runs_on_triton(*tensors: Tensor) -> bool:
    """Whether an operator on these tensors runs as Triton kernels: auto means yes on a GPU, but for float64.

    Raises:
        ValueError: CGE_BACKEND holds another name.
        RuntimeError: Triton was asked for but is not installed, or has nothing to run CPU tensors on.
        TypeError: Triton was asked for with float64.
    """
    chosen = current_backend()
    is_float64 = torch.float64 in [tensor.dtype for tensor in tensors]
    if chosen != "triton":
        return chosen == "auto" and tensors[0].is_cuda and triton is not None and not is_float64
    if triton is None:
        raise RuntimeError("CGE_BACKEND is triton, but Triton is not installed")
    if is_float64:
        raise TypeError("CGE_BACKEND is triton, whose kernels know no float64; use cpu")
    if tensors[0].is_cpu and not kernels_can_run_on_cpu():
        raise RuntimeError(
            "CGE_BACKEND is triton, but the tensors are on the CPU: set TRITON_INTERPRET=1 before importing "
            "cge_kernels, or take the launches with cge_kernels.launching"
        )
    return True


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether torch.compile, torch.export, a trace, a functional transform or a fake tensor looks on.

    Then an operator is called as a custom operator, which these know, else as an autograd function, which takes the
    host half of the time.
    """
    if torch.compiler.is_compiling():  # first: older versions of torch.compile cannot trace the rest
        return True
    for tensor in tensors:
        if tensor.__class__ not in PLAIN:
            return True
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()

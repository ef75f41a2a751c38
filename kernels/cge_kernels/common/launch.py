"""A kernel launch as data, so that whoever compiles, counts or simulates launches sees each one as it would run.

Operators build a `Launch` and hand it to `launch`, which runs it; inside `with launching(function):` the function gets
it instead. The hook is plain process-wide state, since on CUDA autograd runs the backward in a thread of its own.
Replaying a CUDA graph repeats the kernels without coming through here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.device_functions import INTERPRETED, triton


@dataclass(frozen=True)
class Target:
    """The GPU that tiles and grids are chosen for.

    backend "cuda" or "hip"; arch as Triton names it (90, "gfx942"); shared_bytes is what one program may use.
    """

    backend: str
    arch: int | str
    warp_size: int
    multiprocessors: int
    shared_bytes: int

    @property
    def family(self) -> str:
        """ "sm_90" or "gfx942": the name that compilers use."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def has_tf32(self) -> bool:
        """Whether float32 products can be taken by tensor cores."""
        return self.arch >= 80 if self.backend == "cuda" else self.arch == "gfx942"


# Programs of the interpreter run one after another: a grid-wide barrier works with one program only.
INTERPRETER = Target("cuda", 80, 32, multiprocessors=1, shared_bytes=163 * 1024)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[grid](**args, **constants, **options)`.

    args: run-time arguments by name, tensors as tensors. constants: tl.constexpr arguments by name.
    options: num_warps, num_stages, maxnreg, launch_cooperative_grid.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        """Runs the kernel on the device of its tensors; a grid without programs is no launch."""
        if 0 in self.grid:
            return
        tensor = next(value for value in self.args.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[self.grid](**self.args, **self.constants, **self.options)


_hook: Callable[[Launch], None] | None = None
_target: Target | None = None


@contextmanager
def launching(function: Callable[[Launch], None], target: Target | None = None) -> Iterator[None]:
    """Inside, every launch goes to `function(launch)`, which may call `launch.run()`, in place of running.

    target: what tiles and grids are chosen for; without it, the device of the tensors.
    """
    global _hook, _target
    before = _hook, _target
    _hook, _target = function, target
    try:
        yield
    finally:
        _hook, _target = before


def launch(kernel: Any, grid: tuple[int, ...], args: dict, constants: dict, options: dict) -> None:
    """Runs a launch, or gives it to the hook."""
    (_hook or Launch.run)(Launch(kernel, grid, args, constants, options))


def kernels_can_run_on_cpu() -> bool:
    """Whether a launch with CPU tensors goes anywhere: to the interpreter or to a hook."""
    return _hook is not None or (INTERPRETED is not None and INTERPRETED.value)


def current_target(tensor: Tensor) -> Target:
    """The hook's target if it has one, else the tensor's device (the interpreter's for CPU tensors)."""
    if _target is not None:
        return _target
    return device_target(tensor.device.index) if tensor.device.type == "cuda" else INTERPRETER


@cache
def device_target(index: int) -> Target:
    """The GPU with this index, as the driver describes it."""
    with torch.cuda.device(index):
        active = triton.runtime.driver.active.get_current_target()
        shared_bytes = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    return Target(active.backend, active.arch, active.warp_size, multiprocessors, shared_bytes)


def float32_precision(target: Target) -> str:
    """tl.dot's input_precision: what torch.set_float32_matmul_precision asks for, as far as the target has it."""
    wants_tf32 = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if wants_tf32 and target.has_tf32 else "ieee"

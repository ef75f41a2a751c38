"""A kernel launch as data, so that whoever compiles, counts or simulates launches sees each one as it would run.

Operators launch through a Plan (plan.py), which runs a `Launch`; inside `with launching(function):` the function gets
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
        return int(self.arch) >= 80 if self.backend == "cuda" else self.arch == "gfx942"


HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")
# Programs of the interpreter run one after another: a grid-wide barrier works with one program only.
INTERPRETER = Target("cuda", 80, 32, multiprocessors=1, shared_bytes=163 * 1024)


@dataclass(frozen=True)
class Tiles:
    """Block sizes, which are constants of the kernel, and launch options."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's launcher takes. FP fusion, a * b + c rounded once, is Triton's default up to 3.9."""
        bound = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True, **bound}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[grid](**args, **constants, **options)`.

    args: run-time arguments by name, tensors as tensors. constants: tl.constexpr arguments by name.
    options: num_warps, num_stages, enable_fp_fusion, maxnreg, launch_cooperative_grid.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> Any:
        """Runs the kernel on the device of its tensors, and returns it compiled; a grid without programs runs none."""
        if 0 in self.grid:
            return None
        tensor = next(value for value in self.args.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):
            return self.kernel[self.grid](**self.args, **self.constants, **self.options)


_hook: Callable[[Launch], Any] | None = None
_target: Target | None = None


@contextmanager
def launching(function: Callable[[Launch], Any] | None, target: Target | None = None) -> Iterator[None]:
    """Inside, every launch goes to `function(launch)`, which may call `launch.run()`, in place of running.

    target: what tiles and grids are chosen for; without it, the device of the tensors. A target without a function:
    launches go to Triton's active driver, CPU tensors too.
    """
    global _hook, _target
    before = _hook, _target
    _hook, _target = function, target
    try:
        yield
    finally:
        _hook, _target = before


def bind(kernel: Any, tensors: dict[str, Tensor | None], /, **scalars: Any) -> dict[str, Any]:
    """What follows a kernel's pointers: x_stride_1 is tensor x's stride along dimension 1 (0 where x is None).

    The pointers, x_ptr for tensor x, are its first parameters, in the order of the tensors.

    Raises:
        TypeError: they are not, or the kernel wants the stride of another tensor, or a scalar that is not there.
    """
    pointers, rest = kernel.arg_names[: len(tensors)], kernel.arg_names[len(tensors) :]
    if pointers != [f"{name}_ptr" for name in tensors] or any(name.endswith("_ptr") for name in rest):
        wanted = [name for name in kernel.arg_names if name.endswith("_ptr")]
        raise TypeError(f"{kernel.fn.__name__} takes {', '.join(wanted)} first, got tensors {', '.join(tensors)}")
    bound = {}
    for parameter in rest:
        name, is_stride, dimension = parameter.rpartition("_stride_")
        source = tensors if is_stride else scalars
        if (name if is_stride else parameter) not in source:
            raise TypeError(f"{kernel.fn.__name__} wants {parameter}, got {', '.join([*tensors, *scalars])}")
        tensor = tensors[name] if is_stride else None
        bound[parameter] = (
            scalars[parameter] if not is_stride else 0 if tensor is None else tensor.stride(int(dimension))
        )
    return bound


def current_state() -> tuple:
    """All that tiles, grids and the way of launching depend on but the tensors."""
    return _target, _hook is None, takes_tf32()


def taker() -> Callable[[Launch], Any]:
    """Who takes launches: the hook, else they run."""
    return _hook or Launch.run


def is_direct() -> bool:
    """Whether launches are run as compiled kernels: not by a hook, nor by Triton's interpreter."""
    return _hook is None and not (INTERPRETED is not None and INTERPRETED.value)


def kernels_can_run_on_cpu() -> bool:
    """Whether a launch with CPU tensors goes anywhere: to the interpreter, to a hook, or as for another target."""
    return _hook is not None or _target is not None or (INTERPRETED is not None and INTERPRETED.value)


def host_may_look(tensor: Tensor) -> bool:
    """Whether looking at a tensor's numbers makes nobody wait: not on a GPU, nor where a driver is told of one."""
    return tensor.is_cpu and (_target is None or _hook is not None)


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


def takes_tf32() -> bool:
    """Whether torch lets float32 matmuls round to TF32, by whichever of its two settings that was asked for.

    They are torch.set_float32_matmul_precision and, from torch 2.9 on, torch.backends.cuda.matmul.fp32_precision. The
    latter knows of the former; the former's getter raises once the latter is "tf32".
    """
    if HAS_FP32_PRECISION:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def float32_precision(target: Target) -> str:
    """tl.dot's input_precision: TF32 where torch takes it and the target has it."""
    return "tf32" if takes_tf32() and target.has_tf32 else "ieee"

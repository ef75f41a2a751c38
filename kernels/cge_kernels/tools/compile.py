"""Compiles every kernel that the launchers can choose, for many GPUs, on a machine that needs none.

python -m cge_kernels.tools.compile [--target sm_80 gfx942 ...] [--quick]

The operators are called on meta tensors of representative shapes, and each launch that they make is compiled. A row of
the table stands for all compilations of a kernel in one set of tiles, with one set of dtypes, for one target (they
differ in pooling, in layout, in which results are wanted and in which numbers divide by 16), and shows the worst:
registers of a thread, bytes that a thread spills (NVIDIA: loaded and stored in the code; AMD: scratch memory), shared
bytes of a program, programs per multiprocessor and what limits them, and the tensor cores' instruction. '-' stands for
float32 products in a precision that the launcher never chooses for this target.

The exit code is 0 if everything compiles, fits in shared memory, spills nothing and, if it has a grid-wide barrier, is
resident as a whole. sm_75 is compiled only to see that it compiles: there, spills are shown but not counted.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context

import torch
from torch import Tensor

from cge_kernels.common.device_functions import INTERPRETED, triton
from cge_kernels.common.launch import Launch, launching
from cge_kernels.tools.compiler import Resources, compile_launch, measure, specialise, why_not
from cge_kernels.tools.gpus import HARDWARE, Hardware
from cge_kernels.tools.sample_calls import DTYPES, call_operators

PROGRAM = "cge_kernels.tools.compile"
SHORT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PRECISIONS = {"highest": "ieee", "high": "tf32"}
HEADER = (
    "kernel", "tiles", "dtype", "target", "registers", "spilled", "shared", "occupancy", "tensor cores", "problem",
)  # fmt: skip


@dataclass(frozen=True)
class Compilation:
    """One launch to compile; dtype is its column in the table."""

    launch: Launch
    hardware: Hardware
    dtype: str

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Kernel, tiles, dtype and target: the table's first columns."""
        blocks = " ".join(
            f"{name.removeprefix('BLOCK_')}={size}"
            for name, size in self.launch.constants.items()
            if name.startswith("BLOCK_")
        )
        warps, stages = self.launch.options["num_warps"], self.launch.options["num_stages"]
        tiles = f"{blocks}, {warps} warps, {stages} stages"
        return self.launch.kernel.__name__, tiles, self.dtype, self.hardware.target.family


def dtype_name(launch: Launch, precision: str) -> str:
    """The floating dtypes of a launch's tensors and, if it multiplies float32 matrices, their precision."""
    tensors = [value for value in launch.args.values() if isinstance(value, Tensor)]
    name = "+".join(sorted({SHORT_NAMES[tensor.dtype] for tensor in tensors if tensor.is_floating_point()}))
    has_float32_dot = "PRECISION" in launch.constants and launch.args["memory_ptr"].dtype == torch.float32
    return f"{name} {precision}" if has_float32_dot else name


def collect(hardware: Hardware, quick: bool) -> tuple[list[Compilation], set[tuple[str, ...]]]:
    """What is to be compiled for a target, each once, and the table's rows that the launcher never chooses there."""
    compilations: dict[tuple[str, str], Compilation] = {}
    never: set[tuple[str, ...]] = set()
    before = torch.get_float32_matmul_precision()
    for dtype, memory_dtype, setting in DTYPES:
        asked = PRECISIONS[setting]

        def take(launch: Launch, asked: str = asked) -> None:
            compilation = Compilation(launch, hardware, dtype_name(launch, asked))
            if asked in compilation.dtype and launch.constants["PRECISION"] != asked:
                never.add(compilation.row)
                return
            source, options, _ = specialise(launch, hardware.target)
            compilations.setdefault((source.hash(), options.hash()), compilation)

        torch.set_float32_matmul_precision(setting)
        try:
            with launching(take, target=hardware.target):
                call_operators(quick, dtype, memory_dtype)
        finally:
            torch.set_float32_matmul_precision(before)
    return list(compilations.values()), never


_work: list[Compilation] = []  # the pool's processes inherit it: kernels cannot be pickled


def compile_item(index: int) -> Resources:
    """Compiles and measures one of _work. Never raises: what went wrong becomes the result's error."""
    launch, target = _work[index].launch, _work[index].hardware.target
    try:
        with redirect_stdout(StringIO()):  # Triton prints the whole PTX that ptxas rejects
            return measure(compile_launch(launch, target), target)
    except Exception as error:
        return Resources(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")


def compile_all(compilations: list[Compilation]) -> list[Resources]:
    """Compiles on all processors."""
    _work[:] = compilations
    print(f"compiling {len(compilations)} kernels", file=sys.stderr)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        return list(pool.map(compile_item, range(len(compilations))))


def problem(compilation: Compilation, result: Resources) -> str:
    """What the exit code counts, or ""."""
    hardware = compilation.hardware
    if result.error:
        return result.error
    if result.shared > hardware.target.shared_bytes:
        return f"exceeds {hardware.target.shared_bytes} shared bytes"
    options = compilation.launch.options
    programs, _ = hardware.occupancy(result.registers, result.shared, options["num_warps"])
    resident = programs * hardware.target.multiprocessors
    if "launch_cooperative_grid" in options and compilation.launch.grid[0] > resident:
        return f"exceeds {resident} resident programs"
    return "spills" if result.spilled and not hardware.compile_only else ""


def columns(compilation: Compilation, result: Resources) -> tuple[str, ...]:
    """A row of the table."""
    if result.error:
        return *compilation.row, *("-",) * 5, result.error
    num_warps = compilation.launch.options["num_warps"]
    programs, limit = compilation.hardware.occupancy(result.registers, result.shared, num_warps)
    numbers = (str(result.registers), str(result.spilled), str(result.shared), f"{programs} ({limit})")
    return *compilation.row, *numbers, result.instruction, problem(compilation, result)


def table(
    compilations: list[Compilation], results: list[Resources], never: set[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """The rows, sorted, each with the worst of its compilations."""

    def badness(pair: tuple[Compilation, Resources]) -> tuple:
        result = pair[1]
        return bool(result.error), bool(problem(*pair)), result.spilled, result.registers, result.shared

    worst: dict[tuple[str, ...], tuple[Compilation, Resources]] = {}
    for pair in zip(compilations, results, strict=True):
        row = pair[0].row
        worst[row] = max(worst.get(row, pair), pair, key=badness)
    return sorted([columns(*pair) for pair in worst.values()] + [(*row, *("-",) * 5, "") for row in never])


def wanted_hardware(names: list[str]) -> list[Hardware]:
    """The targets of these names, each once; those that this Triton cannot compile for are skipped, on stderr."""
    if unknown := [name for name in names if name not in HARDWARE]:
        sys.exit(f"{PROGRAM}: unknown target {', '.join(unknown)}; known: {', '.join(HARDWARE)}")
    found = [HARDWARE[name] for name in dict.fromkeys(names)]
    for hardware in found:
        if reason := why_not(hardware.target):
            print(f"{PROGRAM}: {hardware.target.family} is skipped: {reason}", file=sys.stderr)
    return [hardware for hardware in found if not why_not(hardware.target)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description="Compiles every kernel for many GPUs, without any."
    )
    parser.add_argument("--target", nargs="+", metavar="NAME", default=list(HARDWARE), help=f"of {', '.join(HARDWARE)}")
    parser.add_argument("--quick", action="store_true", help="only what a training at the paper's shape launches")
    options = parser.parse_args(arguments)
    if triton is None:
        sys.exit(f"{PROGRAM}: Triton is not installed")
    if INTERPRETED.value:
        sys.exit(f"{PROGRAM}: unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    compilations, never = [], set()
    for hardware in wanted_hardware(options.target):
        more, never_here = collect(hardware, options.quick)
        compilations += more
        never |= never_here
    results = compile_all(compilations)
    rows = [HEADER, *table(compilations, results, never)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    problems = [found for pair in zip(compilations, results, strict=True) if (found := problem(*pair))]
    compiled, spilled = sum(not result.error for result in results), problems.count("spills")
    print(f"{compiled} compiled, {len(problems) - spilled} failed, {spilled} spilled")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles every kernel that the launchers can choose, for many GPUs, on a machine that needs none.

python -m cge_kernels.tools.compile [--target sm_80 gfx942 ...] [--quick]

The operators are called on meta tensors of representative shapes, and each launch that they make is compiled. A row of
the table stands for all compilations of a kernel in one configuration, with one set of dtypes, for one target (they
differ in pooling, in layout, in which results are wanted and in which numbers divide by 16), and shows the worst:
registers of a thread, bytes that a thread spills (NVIDIA: loaded and stored in the code; AMD: scratch memory), shared
bytes of a program, programs per multiprocessor and what limits them, and the tensor cores' instruction. '-' stands for
float32 products in a precision that the launcher never chooses for this target.

The exit code is 0 if everything compiles, fits in shared memory and spills nothing. sm_75 is compiled only to see that
it compiles: there, spills are shown but not counted.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.device_functions import INTERPRETED, triton
from cge_kernels.common.launch import Launch, Target, launching
from cge_kernels.tools.gpus import HARDWARE, Hardware
from cge_kernels.tools.sample_calls import DTYPES, call_operators

SHORT_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PRECISIONS = {"highest": "ieee", "high": "tf32"}
HEADER = (
    "kernel", "configuration", "dtype", "target", "registers", "spilled", "shared", "occupancy", "tensor cores",
    "problem",
)  # fmt: skip


@dataclass(frozen=True)
class Compilation:
    """One launch to compile; dtype is its column in the table."""

    launch: Launch
    hardware: Hardware
    dtype: str

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Kernel, configuration, dtype and target: the table's first columns."""
        blocks = " ".join(
            f"{name.removeprefix('BLOCK_')}={size}"
            for name, size in self.launch.constants.items()
            if name.startswith("BLOCK_")
        )
        warps, stages = self.launch.options["num_warps"], self.launch.options["num_stages"]
        configuration = f"{blocks}, {warps} warps, {stages} stages"
        return self.launch.kernel.__name__, configuration, self.dtype, self.hardware.target.family


@dataclass(frozen=True)
class Result:
    """What a compilation needs; where it failed, the error alone."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instruction: str = "-"
    error: str = ""


def dtype_name(launch: Launch, precision: str) -> str:
    """The floating dtypes of a launch's tensors and, if it multiplies float32 matrices, their precision."""
    tensors = [value for value in launch.args.values() if isinstance(value, Tensor)]
    name = "+".join(sorted({SHORT_NAMES[tensor.dtype] for tensor in tensors if tensor.is_floating_point()}))
    has_float32_dot = "PRECISION" in launch.constants and launch.args["memory_pointer"].dtype == torch.float32
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


def specialise(launch: Launch, target: Target) -> tuple[Any, Any, Any]:
    """Source, options and target of a compilation, from the arguments as Triton's launcher would see them.

    The one place that knows Triton's internals; a tensor's address counts from 0, which is as aligned as a fresh one.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    gpu_target = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu_target)
    known = backend.parse_options({}).__dict__
    options = {name: value for name, value in launch.options.items() if name in known}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(**launch.args, **launch.constants)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, None)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, options, gpu_target


def compile_launch(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel of a launch, whose `asm` holds each stage ("ptx", "cubin", "amdgcn").

    The launch's tensors may be on any device, "meta" too; the target's GPU need not be there.
    """
    source, options, gpu_target = specialise(launch, target)
    return triton.compile(source, target=gpu_target, options=options.__dict__)


def measure(compiled: Any, target: Target) -> Result:
    """Reads from the compiled code what it needs."""
    shared = compiled.metadata.shared
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        # vgpr_count includes the accumulation registers. Scalar registers are left out: more than 96 of them, where
        # CDNA holds 7 warps on a SIMD instead of 8, are rare.
        registers, scratch = (
            int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
        found = re.search(r"\bv_(mfma|wmma)", code)
        return Result(registers, scratch, shared, found[1] if found else "-")
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", cubin]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Triton's kernels have no arrays of their own: what goes to local memory (STL) and back (LDL) was spilled.
    suffixes = re.findall(r"\b(?:STL|LDL)((?:\.\w+)*) ", code)
    spilled = sum(int((re.search(r"\d+", suffix) or ["32"])[0]) // 8 for suffix in suffixes)
    found = re.search(r"\b(mma\.sync|wgmma|tcgen05)(?:\.mma)?", compiled.asm["ptx"])
    return Result(int(re.search(r"REG:(\d+)", code)[1]), spilled, shared, found[1] if found else "-")


def compile_and_measure(compilation: Compilation) -> Result:
    """Never raises: what went wrong becomes the result's error."""
    target = compilation.hardware.target
    try:
        with redirect_stdout(StringIO()):  # Triton prints the whole PTX that ptxas rejects
            return measure(compile_launch(compilation.launch, target), target)
    except Exception as error:
        return Result(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")


_work: list[Compilation] = []  # the pool's processes inherit it: kernels cannot be pickled


def compile_item(index: int) -> Result:
    """What a process of the pool runs."""
    return compile_and_measure(_work[index])


def compile_all(compilations: list[Compilation]) -> list[Result]:
    """Compiles on all processors."""
    _work[:] = compilations
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        futures = [pool.submit(compile_item, index) for index in range(len(compilations))]
        for _ in progress(as_completed(futures), len(futures)):
            pass
    return [future.result() for future in futures]


def progress(items: Iterable, total: int) -> Iterable:
    """The items, with tqdm's bar if it is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"compiling {total} kernels", file=sys.stderr)
        return items
    return tqdm(items, total=total, unit="kernel", desc="compiling")


def problem(compilation: Compilation, result: Result) -> str:
    """What the exit code counts, or ""."""
    hardware = compilation.hardware
    if result.error:
        return result.error
    if result.shared > hardware.target.shared_bytes:
        return f"exceeds {hardware.target.shared_bytes} shared bytes"
    return "spills" if result.spilled and not hardware.compile_only else ""


def columns(compilation: Compilation, result: Result) -> tuple[str, ...]:
    """A row of the table."""
    if result.error:
        return *compilation.row, *("-",) * 5, result.error
    num_warps = compilation.launch.options["num_warps"]
    programs, limit = compilation.hardware.occupancy(result.registers, result.shared, num_warps)
    numbers = (str(result.registers), str(result.spilled), str(result.shared), f"{programs} ({limit})")
    return *compilation.row, *numbers, result.instruction, problem(compilation, result)


def table(compilations: list[Compilation], results: list[Result], never: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows, sorted, each with the worst of its compilations."""

    def badness(pair: tuple[Compilation, Result]) -> tuple:
        result = pair[1]
        return bool(result.error), bool(problem(*pair)), result.spilled, result.registers, result.shared

    worst: dict[tuple[str, ...], tuple[Compilation, Result]] = {}
    for pair in zip(compilations, results, strict=True):
        row = pair[0].row
        worst[row] = max(worst.get(row, pair), pair, key=badness)
    return sorted([columns(*pair) for pair in worst.values()] + [(*row, *("-",) * 5, "") for row in never])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cge_kernels.tools.compile", description="Compiles every kernel for many GPUs, without any."
    )
    parser.add_argument("--target", nargs="+", metavar="NAME", default=list(HARDWARE), help=f"of {', '.join(HARDWARE)}")
    parser.add_argument("--quick", action="store_true", help="only what a training at the paper's shape launches")
    options = parser.parse_args(arguments)
    if triton is None:
        sys.exit("cge_kernels.tools.compile: Triton is not installed")
    if INTERPRETED.value:
        sys.exit("cge_kernels.tools.compile: unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    unknown = [name for name in options.target if name not in HARDWARE]
    if unknown:
        sys.exit(f"cge_kernels.tools.compile: unknown target {', '.join(unknown)}; known: {', '.join(HARDWARE)}")
    compilations, never = [], set()
    for name in dict.fromkeys(options.target):
        more, never_here = collect(HARDWARE[name], options.quick)
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

"""Triton's compiler, called for a GPU that need not be there: the one module that knows Triton's internals."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cge_kernels.common.device_functions import triton
from cge_kernels.common.launch import Launch, Target


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs; where the compilation failed, the error alone.

    registers: of a thread. spilled: bytes of a thread (NVIDIA: loaded and stored in the code; AMD: scratch memory).
    shared: bytes of a program. instruction: the tensor cores', or "-".
    """

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instruction: str = "-"
    error: str = ""


def why_not(target: Target) -> str:
    """Why this machine's Triton cannot compile for a target, or ""."""
    if target.backend != "hip" or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5):
        return ""
    from triton.backends.amd.compiler import HIPBackend

    try:
        HIPBackend.path_to_rocm_lld()
    except Exception:  # Triton raises no narrower one
        return f"Triton {triton.__version__} links AMD's code with ROCm's ld.lld, which is not installed"
    return ""


def specialise(launch: Launch, target: Target) -> tuple[Any, Any, Any]:
    """Source, options and target of a compilation, from the arguments as Triton's launcher would see them.

    A tensor's address counts from 0, which is as aligned as a fresh one.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    gpu_target = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu_target)
    known = backend.parse_options({"enable_fp_fusion": True}).__dict__  # said, since its default is changing
    options = backend.parse_options({name: value for name, value in launch.options.items() if name in known})
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(**launch.args, **launch.constants)
    signature, constants, attributes = {}, {}, {}
    for i, (name, (kind, attribute)) in enumerate(zip(bound, specialisation, strict=True)):
        signature[name] = kind
        if kind == "constexpr":
            constants[(i,)] = bound[name]
        elif isinstance(attribute, str):
            attributes[(i,)] = backend.parse_attr(attribute)
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes), options, gpu_target


def compile_launch(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel of a launch, whose `asm` holds each stage ("ptx", "cubin", "amdgcn").

    The launch's tensors may be on any device, "meta" too; the target's GPU need not be there.
    """
    source, options, gpu_target = specialise(launch, target)
    return triton.compile(source, target=gpu_target, options=options.__dict__)


def measure(compiled: Any, target: Target) -> Resources:
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
        return Resources(registers, scratch, shared, found[1] if found else "-")
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", cubin]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Triton's kernels have no arrays of their own: what goes to local memory (STL) and back (LDL) was spilled.
    suffixes = re.findall(r"\b(?:STL|LDL)((?:\.\w+)*) ", code)
    spilled = sum(int((re.search(r"\d+", suffix) or ["32"])[0]) // 8 for suffix in suffixes)
    found = re.search(r"\b(mma\.sync|wgmma|tcgen05)(?:\.mma)?", compiled.asm["ptx"])
    return Resources(int(re.search(r"REG:(\d+)", code)[1]), spilled, shared, found[1] if found else "-")

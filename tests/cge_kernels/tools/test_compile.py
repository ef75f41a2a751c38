"""The compilation table. Its program runs in a process of its own, since interpreted kernels cannot be compiled."""

import os
import re
import subprocess
import sys

import pytest
import triton

from cge_kernels.tools.compiler import why_not
from cge_kernels.tools.gpus import HARDWARE

# The command line, with small kernels in place of the operators
SMALL = """
import sys
import torch
import triton
import triton.language as tl
import cge_kernels.tools.compile as program
from cge_kernels.common.launch import Tiles
from cge_kernels.common.plan import Plan

@triton.jit
def spills_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = x_ptr + tl.arange(0, BLOCK)
    x = tl.load(offsets)
    tl.store(offsets, x / tl.sum(x, axis=0))

@triton.jit
def exceeds_kernel(x_ptr, BLOCK: tl.constexpr):
    offsets = x_ptr + tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(offsets, tl.load(offsets).T)

@triton.jit
def fails_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK + 1), 1.0)

@triton.jit
def crowds_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

def call_operators(quick, dtype, memory_dtype):
    kernel, block, num_warps = {
        "spills": (spills_kernel, 8192, 1),
        "exceeds": (exceeds_kernel, 256, 32),
        "fails": (fails_kernel, 128, 4),
        "crowds": (crowds_kernel, 128, 32),
    }[sys.argv[1]]
    programs, options = (1000, {"launch_cooperative_grid": True}) if sys.argv[1] == "crowds" else (1, {})
    x, tiles = torch.empty(block, device="meta"), Tiles({"BLOCK": block}, num_warps)
    with Plan() as plan:
        plan.launch(kernel, {"x": x}, lambda: (programs, tiles, {}, options))

program.call_operators = call_operators
sys.exit(program.main(sys.argv[2:]))
"""

# The command line, with the forward of revise_logits in place of all operators
REVISION = """
import sys
import torch
import cge_kernels.tools.compile as program
from cge_kernels.tools.sample_calls import empty
from cge_kernels.common.plan import Plan
from cge_kernels.revise_logits.forward import launch_forward

def call_operators(quick, dtype, memory_dtype):
    if memory_dtype == torch.bfloat16 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "high"):
        memory = empty(3, 1041, 2048, dtype=memory_dtype)
        launch_forward(Plan(), empty(64, 1041, dtype=dtype), empty(64, 3, 2048), memory)

program.call_operators = call_operators
sys.exit(program.main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def rows(table: str) -> list[dict[str, str]]:
    """The table's rows, each by column."""
    header, *lines = [re.split(r"\s{2,}", line) for line in table.splitlines()[:-1]]
    return [dict(zip(header, line, strict=False)) for line in lines]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "expected"),
    [
        # 65536 / (32 * 32 registers) = 64 warps, the most there can be
        ("sm_80", 32, 0, 4, (16, "warps")),
        # one register more: 40 for each lane, 65536 / 1280 = 51.2, and each partition holds whole warps: 48
        ("sm_80", 33, 0, 4, (12, "registers")),
        ("sm_80", 20, 0, 1, (32, "programs")),
        ("sm_80", 20, 0, 32, (2, "warps")),
        # 164 KB / (40 KB + 1 KB) = 4 exactly; a byte more is rounded up to 128
        ("sm_80", 32, 40 * 1024, 4, (4, "shared")),
        ("sm_80", 32, 40 * 1024 + 1, 4, (3, "shared")),
        # nothing is reserved on Turing: 64 KB / 32 KB
        ("sm_75", 32, 32 * 1024, 4, (2, "shared")),
        ("sm_86", 16, 0, 4, (12, "warps")),
        ("sm_90", 255, 227 * 1024, 4, (1, "shared")),
        # 512 / 72 registers = 7 warps on each SIMD
        ("gfx942", 66, 0, 4, (7, "registers")),
        ("gfx90a", 16, 0, 1, (32, "warps")),
        ("gfx90a", 16, 64 * 1024, 1, (1, "shared")),
        # 1536 / 120 registers = 12 warps on each SIMD of a WGP
        ("gfx1100", 97, 0, 4, (12, "registers")),
        ("gfx1100", 97, 64 * 1024, 4, (2, "shared")),
    ],
)
def test_occupancy(target, registers, shared, num_warps, expected):
    assert HARDWARE[target].occupancy(registers, shared, num_warps) == expected


def test_what_one_program_may_use():
    kilobytes = {name: hardware.target.shared_bytes // 1024 for name, hardware in HARDWARE.items()}
    assert kilobytes == {
        **{"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99},
        **{"gfx90a": 64, "gfx942": 64, "gfx1100": 64},
    }


@pytest.mark.slow
def test_unknown_target_lists_the_known_ones():
    result = run("-m", "cge_kernels.tools.compile", "--target", "sm_80", "sm_1")
    assert result.returncode == 1
    assert result.stderr == f"cge_kernels.tools.compile: unknown target sm_1; known: {', '.join(HARDWARE)}\n"


@pytest.mark.slow
def test_without_triton():
    result = run("-c", "import sys; sys.modules['triton'] = None; import cge_kernels.tools.compile as c; c.main([])")
    assert result.returncode == 1
    assert result.stderr == "cge_kernels.tools.compile: Triton is not installed\n"


WITHOUT_LINKER = why_not(HARDWARE["gfx1100"].target)
needs_linker = pytest.mark.skipif(bool(WITHOUT_LINKER), reason=WITHOUT_LINKER or "AMD's code is linked")
# older ones keep the reason on further lines
IS_RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)
FAILURE = "CompilationError:" + (" arange's range must be a power of 2" if IS_RECENT else "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "targets", "problems", "summary"),
    [
        # sm_75 is compile-only: its spills are forgiven
        ("spills", ["sm_80", "sm_75"], ["spills", None], "2 compiled, 0 failed, 1 spilled"),
        pytest.param("spills", ["gfx1100"], ["spills"], "1 compiled, 0 failed, 1 spilled", marks=needs_linker),
        ("exceeds", ["sm_80"], ["exceeds 166912 shared bytes"], "1 compiled, 1 failed, 0 spilled"),
        ("fails", ["sm_80"], [FAILURE], "0 compiled, 1 failed, 0 spilled"),
        # a multiprocessor holds two programs of 32 warps
        ("crowds", ["sm_80"], ["exceeds 216 resident programs"], "1 compiled, 1 failed, 0 spilled"),
    ],
)
def test_exit_code(tmp_path, kernel, targets, problems, summary):
    program = tmp_path / "program.py"
    program.write_text(SMALL)
    result = run(str(program), kernel, "--target", *targets)
    assert result.returncode == any(problems), result.stderr
    assert result.stdout.splitlines()[-1] == summary
    table = {row["target"]: row for row in rows(result.stdout)}
    assert [table[target].get("problem") for target in targets] == problems
    if kernel == "spills":
        assert all(int(row["spilled"]) > 0 for row in table.values())


# Prints the PTX of the one-pass kernel
BARRIER = """
import torch
from cge_kernels import launching
from cge_kernels.tools.compiler import compile_launch
from cge_kernels.tools.sample_calls import empty
from cge_kernels.common.plan import Plan
from cge_kernels.revise_logits.one_pass import launch_forward
from cge_kernels.tools.gpus import HARDWARE

target = HARDWARE["sm_80"].target
launches = []
with launching(launches.append, target):
    launch_forward(Plan(), empty(64, 256, 24, 8), empty(64, 100), empty(3, 100, 256), None, 1e-6)
print(compile_launch(launches[0], target).asm["ptx"])
"""


@pytest.mark.slow
def test_the_grid_barrier_orders_what_its_warps_stored(tmp_path):
    program = tmp_path / "barrier.py"
    program.write_text(BARRIER)
    finished = run(str(program))
    assert finished.returncode == 0, finished.stderr
    lines = [line.strip() for line in finished.stdout.splitlines()]
    arrival = next(number for number, line in enumerate(lines) if "atom" in line and "acq_rel" in line)
    assert re.search(r"atom\.global\.gpu\.acq_rel\.add", lines[arrival])
    # All warps wait for each other after their last store and before the one thread that arrives.
    last_store = max(number for number, line in enumerate(lines[:arrival]) if "st.global" in line)
    assert any(line.startswith("bar.sync") for line in lines[last_store:arrival])
    # The spin loads with acquire, before any load of what other programs stored.
    following = [line for line in lines[arrival + 1 :] if re.search(r"(ld|atom)\.global|cp\.async\.c", line)]
    assert re.search(r"(ld|atom)\.global\.gpu\.acquire", following[0]), following[0]


@pytest.mark.slow
def test_a_real_launch(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(REVISION)
    result = run(str(program), "--target", "sm_80", "gfx942", "gfx90a")
    assert result.returncode == 0, result.stderr
    assert ("gfx942 is skipped: " in result.stderr) == bool(WITHOUT_LINKER)
    revisions = {(row["dtype"], row["target"]): row for row in rows(result.stdout) if row["kernel"] == "revise_kernel"}
    instruction = {key: row["tensor cores"] for key, row in revisions.items()}
    assert instruction[("bf16+fp32", "sm_80")] == instruction[("fp32 tf32", "sm_80")] == "mma.sync"
    if not WITHOUT_LINKER:
        assert instruction[("fp32 tf32", "gfx942")] == "mfma"
        assert instruction[("bf16+fp32", "gfx942")] == instruction[("bf16+fp32", "gfx90a")] == "mfma"
        never = revisions.pop(("fp32 tf32", "gfx90a"))
        assert {never[name] for name in ("registers", "spilled", "shared", "occupancy", "tensor cores")} == {"-"}
    for row in revisions.values():
        assert int(row["registers"]) > 0
        assert int(row["shared"]) > 0
        assert int(row["occupancy"].split()[0]) > 0

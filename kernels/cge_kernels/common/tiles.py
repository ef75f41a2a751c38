"""Tile sizes, warps and stages of every kernel, and the scratch budget.

The tables are written by hand: change a row after measuring it, then run python -m cge_kernels.tools.compile,
since a row must not spill on a target that it is chosen for. All block sizes are powers of two.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.launch import Target, float32_precision

SCRATCH_MB = 256  # default of CGE_SCRATCH_MB: what an operator may keep or allocate beyond its results


def scratch_bytes() -> int:
    """The scratch budget of one operator call, bytes: CGE_SCRATCH_MB (mebibytes) if set, else 256 MiB."""
    text = os.environ.get("CGE_SCRATCH_MB", str(SCRATCH_MB))
    if not text.isdecimal():
        raise ValueError(f"CGE_SCRATCH_MB must be a whole number of mebibytes, got {text!r}")
    return int(text) << 20


SCORE_ROW = 16  # scores' rows are padded to a multiple of this: each starts on a 32-byte boundary in any dtype


def score_row(classes: int) -> int:
    """Length of a row of scores: N rounded up to a multiple of 16."""
    return cdiv(classes, SCORE_ROW) * SCORE_ROW


def scores_are_kept(local_features: Tensor, memory: Tensor) -> bool:
    """Whether the scores of revise_logits' forward, float32, fit in the scratch budget until its backward."""
    return local_features.shape[0] * memory.shape[0] * score_row(memory.shape[1]) * 4 <= scratch_bytes()


def chunk_of_classes(batch: int, stripes: int, classes: int) -> int:
    """How many classes a backward without kept scores takes at a time: those whose scores fit in the budget."""
    fitting = scratch_bytes() // (batch * stripes * 4 * SCORE_ROW) * SCORE_ROW
    return min(score_row(classes), max(SCORE_ROW, fitting))


def logits_are_kept(batch: int, stripes: int, classes: int) -> bool:
    """Whether revised_cross_entropy keeps logits and scores, float32, for its backward: in half of the budget.

    The other half is for their gradients, which the backward makes chunk by chunk.
    """
    return (stripes + 1) * classes * score_row(batch) * 4 <= scratch_bytes() // 2


def chunk_of_logits(batch: int, stripes: int, classes: int) -> int:
    """How many classes revised_cross_entropy takes at a time: those whose logits and scores fit in half of the budget.

    At least 16, which the budget may be too small for.
    """
    fitting = scratch_bytes() // 2 // ((stripes + 1) * score_row(batch) * 4)
    return min(classes, max(SCORE_ROW, fitting // SCORE_ROW * SCORE_ROW))


def chunk_of_statistics(batch: int, stripes: int, classes: int) -> int:
    """How many classes the forward of revised_cross_entropy takes at a time: half of the budget is for statistics.

    At least 64, the widest tile. A tile of 16 classes, the narrowest, stores for each sample the highest value and its
    class of n + 1 classifiers, and two sums.
    """
    fitting = scratch_bytes() // 2 * 16 // ((8 * (stripes + 1) + 8) * score_row(batch))
    return min(classes, max(64, fitting // 64 * 64))


@dataclass(frozen=True)
class Configuration:
    """Blocks (constants of the kernel) and launch options."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What Launch takes."""
        bound = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **bound}


@dataclass(frozen=True)
class Matmul:
    """Tiles of a matmul.

    BLOCK_B is 16 to 64, by the batch; BLOCK_N (or BLOCK_C) the widest of `widths` with which there is a program for
    each multiprocessor, else the last; BLOCK_K is `depth`. max_registers: of a thread; without a bound ptxas takes
    fewer than it needs, for more programs on a multiprocessor, and spills a few of them.
    """

    widths: tuple[int, ...]
    depth: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# What is contiguous in memory: positions (NCHW) or channels (channels_last) -> stripe_pool's tiles, long on that axis.
# Four numbers for each thread where bfloat16 is stored beside float32 loads: with eight, a request would use half of
# each sector.
POOL = {
    "positions": Configuration({"BLOCK_C": 16, "BLOCK_S": 64}, num_warps=4),
    "channels": Configuration({"BLOCK_C": 64, "BLOCK_S": 16}, num_warps=4),
}
POOL_BACKWARD = {
    "positions": Configuration({"BLOCK_C": 16, "BLOCK_S": 64}, num_warps=4),
    "channels": Configuration({"BLOCK_C": 64, "BLOCK_S": 8}, num_warps=4),
}
PREPARE = Configuration({"BLOCK_B": 16, "BLOCK_C": 32}, num_warps=4)
GRAD_SCORES = Configuration({"BLOCK_B": 8, "BLOCK_N": 64}, num_warps=4)
COMBINE = Configuration({"BLOCK_B": 16, "BLOCK_T": 32}, num_warps=4, max_registers=255)
GRAD_LOGITS = Configuration({"BLOCK_B": 64, "BLOCK_N": 8}, num_warps=4)

# (target, precision of the product) -> the matmuls' tiles. Targets: "cuda" or "hip", and single ones that differ.
# Precisions: "half" of 16-bit operands; "tf32" and "ieee" of float32 ones, ieee without tensor cores on NVIDIA, where
# wider tiles spill. Stages: with one program on a multiprocessor the tiles in flight alone cover the memory's latency;
# on sm_100 a fourth one spills.
REVISE = {
    ("cuda", "half"): Matmul((64, 32, 16), depth=64, num_warps=4, num_stages=4, max_registers=255),
    ("cuda", "tf32"): Matmul((32, 16), depth=32, num_warps=4, num_stages=4, max_registers=255),
    ("cuda", "ieee"): Matmul((16,), depth=16, num_warps=4, num_stages=4, max_registers=255),
    ("sm_100", "half"): Matmul((64, 32, 16), depth=64, num_warps=4, num_stages=3, max_registers=255),
    ("sm_75", "half"): Matmul((64, 32, 16), depth=64, num_warps=4, num_stages=2),
    ("sm_75", "ieee"): Matmul((32, 16), depth=32, num_warps=4, num_stages=2),
    ("hip", "half"): Matmul((64, 32, 16), depth=64, num_warps=4, num_stages=2),
    ("hip", "tf32"): Matmul((32, 16), depth=32, num_warps=4, num_stages=2),
    ("hip", "ieee"): Matmul((32, 16), depth=32, num_warps=4, num_stages=2),
}
WIDEST_IN_ONE_PASS = 32  # wider tiles spill beside what pooling needs
# The depth differs from BLOCK_B and BLOCK_C: of tiles with one shape Triton loads the float32 ones like the 16-bit
# ones, eight numbers for each lane, and then each request uses half of its sectors.
GRAD_LOCAL = {
    ("cuda", "half"): Matmul((32, 16), depth=128, num_warps=4, num_stages=3, max_registers=255),
    ("cuda", "tf32"): Matmul((32, 16), depth=32, num_warps=4, num_stages=3, max_registers=255),
    ("cuda", "ieee"): Matmul((16,), depth=32, num_warps=4, num_stages=3, max_registers=255),
    ("sm_75", "half"): Matmul((32, 16), depth=128, num_warps=4, num_stages=2),
    ("sm_75", "ieee"): Matmul((32, 16), depth=32, num_warps=4, num_stages=2),
    ("hip", "half"): Matmul((32, 16), depth=128, num_warps=4, num_stages=3),
    ("hip", "tf32"): Matmul((32, 16), depth=32, num_warps=4, num_stages=3),
    ("hip", "ieee"): Matmul((32, 16), depth=32, num_warps=4, num_stages=3),
}


def contiguous_axis(feature_map: Tensor) -> str:
    """The key of POOL: which neighbours of the map are nearer in memory."""
    return "positions" if feature_map.stride(3) <= feature_map.stride(1) else "channels"


def revise_configuration(target: Target, dtype: torch.dtype, batch: int, classes: int) -> Configuration:
    """For the matmul of revise_logits: N x B tiles."""
    return matmul_configuration(matmul(REVISE, target, dtype), "BLOCK_N", target, batch, classes)


def cross_entropy_configuration(target: Target, dtype: torch.dtype, batch: int, classes: int) -> Configuration:
    """For the matmuls of revised_cross_entropy: N x B tiles."""
    return matmul_configuration(matmul(REVISE, target, dtype), "BLOCK_N", target, batch, classes)


def project_configuration(target: Target, channels: int) -> Configuration:
    """For the gradient's projection: a row in one block, four of its numbers in each thread if they are enough."""
    block = next_power_of_2(channels)
    return Configuration({"BLOCK_C": block}, min(1024 // target.warp_size, max(1, block // (4 * target.warp_size))))


def one_pass_configuration(target: Target, dtype: torch.dtype, batch: int, classes: int) -> Configuration:
    """For the matmul of revise_logits_one_pass: N x B tiles."""
    tiles = matmul(REVISE, target, dtype)
    narrow = replace(tiles, widths=tuple(width for width in tiles.widths if width <= WIDEST_IN_ONE_PASS))
    return matmul_configuration(narrow, "BLOCK_N", target, batch, classes)


def grad_local_configuration(target: Target, dtype: torch.dtype, batch: int, columns: int) -> Configuration:
    """For the matmul of revise_logits' backward: B x C tiles; columns: the channels of all stripes."""
    return matmul_configuration(matmul(GRAD_LOCAL, target, dtype), "BLOCK_C", target, batch, columns)


def matmul(table: dict[tuple[str, str], Matmul], target: Target, dtype: torch.dtype) -> Matmul:
    """A table's row for a target and the operands' dtype."""
    precision = float32_precision(target) if dtype == torch.float32 else "half"
    return table.get((target.family, precision)) or table[target.backend, precision]


def matmul_configuration(tiles: Matmul, width_name: str, target: Target, batch: int, columns: int) -> Configuration:
    """The tiles that are small enough to fill the machine."""
    rows = min(64, max(16, next_power_of_2(batch)))
    filling = [w for w in tiles.widths if cdiv(batch, rows) * cdiv(columns, w) >= target.multiprocessors]
    blocks = {"BLOCK_B": rows, width_name: [*filling, tiles.widths[-1]][0], "BLOCK_K": tiles.depth}
    return Configuration(blocks, tiles.num_warps, tiles.num_stages, tiles.max_registers)


def write_configuration(target: Target, batch: int, channels: int) -> Configuration:
    """For write_memory_: a row in one block, four of its numbers in each thread if they are enough."""
    block = next_power_of_2(channels)
    num_warps = min(1024 // target.warp_size, max(1, block // (4 * target.warp_size)))
    return Configuration({"BLOCK_B": min(128, next_power_of_2(batch)), "BLOCK_C": block}, num_warps)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)

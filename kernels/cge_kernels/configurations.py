"""Tile sizes and warps of every kernel, by hand: edit a row here after measuring it with bench/.

A row says for which calls it is meant; the first row that fits is taken. All block sizes are powers of two.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cge_kernels.launch import Target

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


@dataclass(frozen=True)
class Configuration:
    """Blocks (constants of the kernel) and launch options."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What Launch takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# stripe_pool: a tile of channels x positions, long along the axis that is contiguous.
POOL_POSITIONS_CONTIGUOUS = Configuration({"BLOCK_C": 16, "BLOCK_S": 64}, num_warps=4)
POOL_CHANNELS_CONTIGUOUS = Configuration({"BLOCK_C": 64, "BLOCK_S": 16}, num_warps=4)

# Four float32 numbers for each thread: with eight, beside bfloat16 ones, a request would use half of each sector.
POOL_BACKWARD_CHANNELS_CONTIGUOUS = Configuration({"BLOCK_C": 64, "BLOCK_S": 16}, num_warps=8)
PREPARE = Configuration({"BLOCK_B": 16, "BLOCK_C": 32}, num_warps=4)
GRAD_SCORES = Configuration({"BLOCK_B": 8, "BLOCK_N": 64}, num_warps=4)


def positions_are_contiguous(feature_map: Tensor) -> bool:
    """Whether neighbouring positions of the map are nearer in memory than neighbouring channels."""
    return feature_map.stride(3) <= feature_map.stride(1)


def pool_configuration(feature_map: Tensor) -> Configuration:
    """For stripe_pool's forward."""
    return POOL_POSITIONS_CONTIGUOUS if positions_are_contiguous(feature_map) else POOL_CHANNELS_CONTIGUOUS


def pool_backward_configuration(feature_map: Tensor) -> Configuration:
    """For stripe_pool's backward."""
    return POOL_POSITIONS_CONTIGUOUS if positions_are_contiguous(feature_map) else POOL_BACKWARD_CHANNELS_CONTIGUOUS


def prepare_configuration() -> Configuration:
    """For the squared lengths of revise_logits."""
    return PREPARE


def grad_scores_configuration() -> Configuration:
    """For the elementwise part of revise_logits' backward."""
    return GRAD_SCORES


def revise_configuration(target: Target, dtype: torch.dtype, batch: int, classes: int) -> Configuration:
    """For the matmul of revise_logits: N x B tiles, small enough to fill the machine."""
    rows = min(64, max(16, next_power_of_2(batch)))
    widths = (32, 16) if dtype == torch.float32 else (64, 32, 16)  # the wider one spills without tensor cores
    columns = widest_that_fills(target, cdiv(batch, rows), classes, widths)
    depth = 128 // dtype.itemsize
    return Configuration(
        {"BLOCK_B": rows, "BLOCK_N": columns, "BLOCK_K": depth}, num_warps=4, num_stages=stages(target)
    )


def grad_local_configuration(target: Target, dtype: torch.dtype, batch: int, columns: int) -> Configuration:
    """For the matmul of revise_logits' backward: B x C tiles of all stripes, small enough to fill the machine.

    BLOCK_K differs from the other two: of tiles with one shape Triton loads the float32 ones like the 16-bit ones,
    eight numbers for each lane, and then each request uses half of its sectors.
    """
    rows = min(64, max(16, next_power_of_2(batch)))
    width = widest_that_fills(target, cdiv(batch, rows), columns, (32, 16))
    depth = 128 if dtype.itemsize == 2 else 32
    return Configuration({"BLOCK_B": rows, "BLOCK_C": width, "BLOCK_K": depth}, num_warps=4, num_stages=3)


def stages(target: Target) -> int:
    """Tiles in flight, but one: with one program on a multiprocessor these alone cover the memory's latency."""
    return 4 if target.backend == "cuda" and target.arch >= 80 else 2


def write_configuration(target: Target, batch: int, channels: int) -> Configuration:
    """For write_memory_: a row in one block, four of its numbers in each thread if they are enough."""
    block = next_power_of_2(channels)
    return Configuration(
        {"BLOCK_B": min(128, next_power_of_2(batch)), "BLOCK_C": block},
        num_warps=min(1024 // target.warp_size, max(1, block // (4 * target.warp_size))),
    )


def widest_that_fills(target: Target, row_tiles: int, columns: int, widths: tuple[int, ...]) -> int:
    """The widest tile with which there is a program for each multiprocessor, else the narrowest."""
    for width in widths:
        if row_tiles * cdiv(columns, width) >= target.multiprocessors:
            return width
    return widths[-1]


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)

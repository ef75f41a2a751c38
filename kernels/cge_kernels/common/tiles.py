"""Tile sizes, warps and stages of every kernel.

The tables are written by hand: change a row after measuring it, then run python -m cge_kernels.tools.compile,
since a row must not spill on a target that it is chosen for. All block sizes are powers of two.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cge_kernels.common.launch import Target, Tiles, float32_precision

MAX_PARTS = 8  # partial sums that are loaded at a time; below any BLOCK_N


@dataclass(frozen=True)
class MatmulTiles:
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
    "positions": Tiles({"BLOCK_C": 16, "BLOCK_S": 64}, num_warps=4),
    "channels": Tiles({"BLOCK_C": 64, "BLOCK_S": 16}, num_warps=4),
}
# In revise_logits_one_pass, of which a multiprocessor holds 2 or 3 programs: together they must have as much in flight.
ONE_PASS_POOL = {"positions": {"BLOCK_C": 64, "BLOCK_S": 64}, "channels": {"BLOCK_C": 128, "BLOCK_S": 32}}
POOL_BACKWARD = {
    "positions": Tiles({"BLOCK_C": 16, "BLOCK_S": 64}, num_warps=4),
    "channels": Tiles({"BLOCK_C": 64, "BLOCK_S": 8}, num_warps=4),
}
CAST_AND_NORM = Tiles({"BLOCK_B": 16, "BLOCK_C": 32}, num_warps=4)
GRAD_SCORES = Tiles({"BLOCK_B": 8, "BLOCK_N": 64}, num_warps=4)
REDUCE_TILES = Tiles({"BLOCK_B": 16, "BLOCK_T": 32}, num_warps=4, max_registers=255)
# How the saved logits lie -> grad_logits' tiles, long on the axis that is contiguous. BLOCK: as in POOL,
# four numbers of what is converted for each thread.
GRAD_LOGITS = {
    "by class": Tiles({"BLOCK_B": 64, "BLOCK_N": 8, "BLOCK": 512}, num_warps=4),
    "by sample": Tiles({"BLOCK_B": 8, "BLOCK_N": 64, "BLOCK": 512}, num_warps=4),
}

# (target, precision of the product) -> the matmuls' tiles. Targets: "cuda" or "hip", and single ones that differ.
# Precisions: "half" of 16-bit operands; "tf32" and "ieee" of float32 ones, ieee without tensor cores on NVIDIA, where
# wider tiles spill. Stages: with one program on a multiprocessor the tiles in flight alone cover the memory's latency;
# on sm_100 a fourth one spills.
SCORES = {
    ("cuda", "half"): MatmulTiles((64, 32, 16), depth=64, num_warps=4, num_stages=4, max_registers=255),
    ("cuda", "tf32"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=4, max_registers=255),
    ("cuda", "ieee"): MatmulTiles((16,), depth=16, num_warps=4, num_stages=4, max_registers=255),
    ("sm_100", "half"): MatmulTiles((64, 32, 16), depth=64, num_warps=4, num_stages=3, max_registers=255),
    ("sm_75", "half"): MatmulTiles((64, 32, 16), depth=64, num_warps=4, num_stages=2),
    ("sm_75", "ieee"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=2),
    ("hip", "half"): MatmulTiles((64, 32, 16), depth=64, num_warps=4, num_stages=2),
    ("hip", "tf32"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=2),
    ("hip", "ieee"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=2),
}
# The products of one classifier and a part of the channels. Each tile of classes loads the features again, so it is
# wide; with so few programs the tiles in flight alone cover the memory's latency. Two programs fit on a multiprocessor.
PRODUCTS = {
    ("cuda", "half"): MatmulTiles((64,), depth=64, num_warps=4, num_stages=4, max_registers=255),
    ("cuda", "tf32"): MatmulTiles((64,), depth=32, num_warps=4, num_stages=3, max_registers=255),
    ("cuda", "ieee"): MatmulTiles((32,), depth=16, num_warps=4, num_stages=4, max_registers=255),
    ("sm_75", "half"): MatmulTiles((64,), depth=32, num_warps=4, num_stages=2),
    ("sm_75", "ieee"): MatmulTiles((32,), depth=32, num_warps=4, num_stages=2),
    ("hip", "half"): MatmulTiles((64,), depth=64, num_warps=4, num_stages=2),
    ("hip", "tf32"): MatmulTiles((64,), depth=32, num_warps=4, num_stages=2),
    ("hip", "ieee"): MatmulTiles((32,), depth=32, num_warps=4, num_stages=2),
}
MOST_PARTS = 8  # of the channels
LOSS_TILE = 8192  # numbers of one sample that loss_kernel holds: of all classifiers, as many classes as fit
WIDEST_IN_ONE_PASS = 32  # wider tiles spill beside what pooling needs
# The depth differs from BLOCK_B and BLOCK_C: of tiles with one shape Triton loads the float32 ones like the 16-bit
# ones, eight numbers for each lane, and then each request uses half of its sectors.
GRAD_LOCAL = {
    ("cuda", "half"): MatmulTiles((32, 16), depth=128, num_warps=4, num_stages=3, max_registers=255),
    ("cuda", "tf32"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=3, max_registers=255),
    ("cuda", "ieee"): MatmulTiles((16,), depth=32, num_warps=4, num_stages=3, max_registers=255),
    ("sm_75", "half"): MatmulTiles((32, 16), depth=128, num_warps=4, num_stages=2),
    ("sm_75", "ieee"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=2),
    ("hip", "half"): MatmulTiles((32, 16), depth=128, num_warps=4, num_stages=3),
    ("hip", "tf32"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=3),
    ("hip", "ieee"): MatmulTiles((32, 16), depth=32, num_warps=4, num_stages=3),
}


def contiguous_axis(feature_map: Tensor) -> str:
    """The key of POOL: which neighbours of the map are nearer in memory."""
    return "positions" if feature_map.stride(3) <= feature_map.stride(1) else "channels"


def scores_tiles(target: Target, dtype: torch.dtype, batch: int, classes: int) -> Tiles:
    """For the matmuls of scores and logits, N x B, in revise_logits and revised_cross_entropy."""
    return filling_tiles(matmul_tiles(SCORES, target, dtype), "BLOCK_N", target, batch, classes)


def parts_of_channels(target: Target, dtype: torch.dtype, batch: int, stripes: int, classes: int, channels: int) -> int:
    """In how many parts of the channels revised_cross_entropy takes each classifier's products.

    0 where it streams over the classifiers instead: there are so many classes or samples that a program for each of the
    widest tiles fills the machine. The parts are as few as give each multiprocessor a program.
    """
    widest = matmul_tiles(SCORES, target, dtype).widths[0]
    if not 0 < cdiv(batch, block_of_samples(batch)) * cdiv(classes, widest) < target.multiprocessors:
        return 0
    tiles = products_tiles(target, dtype, batch)
    programs = cdiv(batch, tiles["BLOCK_B"]) * cdiv(classes, tiles["BLOCK_N"]) * (stripes + 1)
    return min(cdiv(target.multiprocessors, programs), cdiv(channels, tiles["BLOCK_K"]), MOST_PARTS)


def products_tiles(target: Target, dtype: torch.dtype, batch: int) -> Tiles:
    """For the matmul of one classifier and a part of the channels in revised_cross_entropy, B x N."""
    tiles = matmul_tiles(PRODUCTS, target, dtype)
    blocks = {"BLOCK_B": block_of_samples(batch), "BLOCK_N": tiles.widths[0], "BLOCK_K": tiles.depth}
    return Tiles(blocks, tiles.num_warps, tiles.num_stages, tiles.max_registers)


def loss_tiles(target: Target, stripes: int, classes: int, channels: int) -> Tiles:
    """For a program that goes over one sample's logits and scores, and its local features: BLOCK_I classifiers x each.

    In the longer block a thread has four neighbours of a row at a time; the other rows are the same thread's.
    """
    classifiers = next_power_of_2(stripes + 1)
    longest = max(128, LOSS_TILE // classifiers)
    block_n, block_c = (min(longest, max(128, next_power_of_2(length))) for length in (classes, channels))
    num_warps = min(16, max(1, max(block_n, block_c) // (4 * target.warp_size)))
    return Tiles({"BLOCK_I": classifiers, "BLOCK_N": block_n, "BLOCK_C": block_c}, num_warps, max_registers=128)


def one_pass_tiles(target: Target, dtype: torch.dtype, batch: int, classes: int, is_flat: bool) -> tuple[Tiles, int]:
    """For the matmul of revise_logits_one_pass, N x B, and how many programs of such tiles the GPU holds at once.

    is_flat: whether the map's rows follow one another; else offsets take registers.
    """
    tiles = matmul_tiles(SCORES, target, dtype)
    narrow = replace(tiles, widths=tuple(width for width in tiles.widths if width <= WIDEST_IN_ONE_PASS))
    filling = filling_tiles(narrow, "BLOCK_N", target, batch, classes)
    if target.multiprocessors == 1:  # the interpreter, whose programs run one after another, has no barrier
        return filling, 1
    if filling.max_registers and dtype != torch.float32 and filling["BLOCK_N"] == 16 and is_flat:
        return replace(filling, max_registers=168), 3 * target.multiprocessors  # 3 * 128 threads * 168 registers
    return filling, 2 * target.multiprocessors


def grad_local_tiles(target: Target, dtype: torch.dtype, batch: int, columns: int) -> Tiles:
    """For the matmul of revise_logits' backward, B x C; columns: the channels of all stripes."""
    return filling_tiles(matmul_tiles(GRAD_LOCAL, target, dtype), "BLOCK_C", target, batch, columns)


def row_tiles(target: Target, channels: int, **blocks: int) -> Tiles:
    """For a program that holds a row in one block: four of its numbers in each thread if they are enough."""
    block = next_power_of_2(channels)
    num_warps = min(1024 // target.warp_size, max(1, block // (4 * target.warp_size)))
    return Tiles({**blocks, "BLOCK_C": block}, num_warps)


def write_tiles(target: Target, batch: int, channels: int) -> Tiles:
    """For write_memory_; BLOCK_B: the labels that are compared at a time."""
    return row_tiles(target, channels, BLOCK_B=min(128, next_power_of_2(batch)))


def matmul_tiles(table: dict[tuple[str, str], MatmulTiles], target: Target, dtype: torch.dtype) -> MatmulTiles:
    """A table's row for a target and the dtype of the two factors."""
    precision = float32_precision(target) if dtype == torch.float32 else "half"
    return table.get((target.family, precision)) or table[target.backend, precision]


def filling_tiles(tiles: MatmulTiles, width_name: str, target: Target, batch: int, columns: int) -> Tiles:
    """The tiles that are small enough to fill the machine."""
    rows = block_of_samples(batch)
    filling = [w for w in tiles.widths if cdiv(batch, rows) * cdiv(columns, w) >= target.multiprocessors]
    blocks = {"BLOCK_B": rows, width_name: [*filling, tiles.widths[-1]][0], "BLOCK_K": tiles.depth}
    return Tiles(blocks, tiles.num_warps, tiles.num_stages, tiles.max_registers)


def block_of_samples(batch: int) -> int:
    """BLOCK_B of a matmul."""
    return min(64, max(16, next_power_of_2(batch)))


def block_of_parts(parts: int) -> int:
    """BLOCK_PARTS, for so many partial sums."""
    return min(MAX_PARTS, next_power_of_2(parts))


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)

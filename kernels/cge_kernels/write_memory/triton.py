"""The kernel of write_memory_ and its launch; op.py has the formula.

A program owns one sample and one stripe, and returns unless its sample is the first of its identity; the first one sums
the identity's instances in the order of the batch, so the result is the same from run to run. There is no sort, no
atomic and no look from the host. A row is held whole in registers, so that it is read and written once.
"""

from torch import Tensor

from cge_kernels.common.device_functions import NORM_EPS, jit, product, tl
from cge_kernels.common.launch import Tiles, current_target
from cge_kernels.common.plan import Plan
from cge_kernels.common.tiles import write_tiles

MAX_CHANNELS = 8_192  # a row of more does not fit a program's registers


@jit
def unit_or_zero(row):
    """row / max(||row||, NORM_EPS), and the norm."""
    norm = tl.sqrt_rn(tl.sum(product(row, row), axis=0))
    return row / tl.maximum(norm, NORM_EPS), norm


@jit
def write_memory_kernel(
    memory_ptr, low_precision_memory_ptr, local_ptr, labels_ptr, momentum_ptr,
    batch, classes, channels, local_stride_0, local_stride_1, local_stride_2, labels_stride_0,
    STRIPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program for one stripe of one sample.

    memory_ptr: (n, N, C) float32, contiguous, written in place
    low_precision_memory_ptr: (n, N, C), contiguous, of any dtype, written in place; or None
    local_ptr: (B, n, C), any strides
    labels_ptr: (B,), any integer, any stride
    momentum_ptr: 0-d float32
    """
    sample = tl.program_id(0) // STRIPES
    stripe = tl.program_id(0) % STRIPES
    label = tl.load(labels_ptr + tl.cast(sample, tl.int64) * labels_stride_0).to(tl.int64)
    leads = (label >= 0) & (label < classes)
    for start in range(0, sample, BLOCK_B):
        earlier = start + tl.arange(0, BLOCK_B)
        labels = tl.load(labels_ptr + earlier.to(tl.int64) * labels_stride_0, mask=earlier < sample, other=-1)
        leads = leads & (tl.sum((labels.to(tl.int64) == label).to(tl.int32), axis=0) == 0)
    if leads:
        channel = tl.arange(0, BLOCK_C)
        channel_mask = channel < channels
        local_row = local_ptr + tl.cast(stripe, tl.int64) * local_stride_1 + channel.to(tl.int64) * local_stride_2
        total = tl.zeros([BLOCK_C], tl.float32)
        instances = 0
        for other in range(sample, batch):
            is_instance = tl.load(labels_ptr + tl.cast(other, tl.int64) * labels_stride_0).to(tl.int64) == label
            if is_instance:
                feature = tl.load(local_row + tl.cast(other, tl.int64) * local_stride_0, mask=channel_mask, other=0.0)
                total += feature.to(tl.float32)
                instances += 1
        update, norm = unit_or_zero(total / instances)
        row = (tl.cast(stripe, tl.int64) * classes + label) * channels + channel
        old = tl.load(memory_ptr + row, mask=channel_mask, other=0.0)
        never_seen = tl.max((old != 0.0).to(tl.int32), axis=0) == 0
        momentum = tl.load(momentum_ptr)
        blended, _ = unit_or_zero(momentum * old + (1.0 - momentum) * update)
        new = tl.where(norm < NORM_EPS, old, tl.where(never_seen, update, blended))
        tl.store(memory_ptr + row, new, mask=channel_mask)
        if low_precision_memory_ptr is not None:
            tl.store(low_precision_memory_ptr + row, new, mask=channel_mask)


def launch_write(
    plan: Plan, memory: Tensor, local_features: Tensor, labels: Tensor, momentum: Tensor,
    low_precision_memory: Tensor | None,
) -> None:  # fmt: skip
    """Writes memory and low_precision_memory in place."""
    stripes, classes, channels = memory.shape
    batch = len(labels)

    def prepare() -> tuple[int, Tiles, dict[str, int]]:
        if channels > MAX_CHANNELS:
            raise ValueError(f"memory must have at most {MAX_CHANNELS} channels, got {channels}")
        tiles = write_tiles(current_target(memory), batch, channels)
        return batch * stripes, tiles, {"batch": batch, "classes": classes, "channels": channels, "STRIPES": stripes}

    plan.launch(
        write_memory_kernel,
        {
            "memory": memory, "low_precision_memory": low_precision_memory, "local": local_features, "labels": labels,
            "momentum": momentum,
        },
        prepare,
    )  # fmt: skip

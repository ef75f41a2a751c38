"""The moving-average write of a batch's local features into the class memory.

For each identity y of the batch, u_i = normalise(mean of its f_i): M[i,y] <- normalise(alpha * M[i,y] + (1-alpha) u_i).
One launch: a program owns one sample and one stripe, and returns unless its sample is the first of its identity; the
first one sums the identity's instances in the order of the batch, so the result is the same from run to run. There is
no sort, no atomic and no look from the host. A row is held whole in registers, so that it is read and written once.
"""

import torch
from torch import Tensor

from cge_kernels.common.checks import require_memory, require_same_device, require_shape, require_tensor, valid_labels
from cge_kernels.common.device_functions import jit, product, tl
from cge_kernels.common.dispatch import implementation
from cge_kernels.common.launch import current_target, launch
from cge_kernels.common.tiles import write_configuration
from cge_kernels.write_memory import cpu

MAX_CHANNELS = 8_192  # a row of more does not fit a program's registers
NORM_EPS = 1e-12  # a mean feature below this norm counts as zero: it has no direction


@jit
def unit_or_zero(row, NORM_EPS: tl.constexpr):
    """row / max(||row||, NORM_EPS), and the norm."""
    norm = tl.sqrt_rn(tl.sum(product(row, row), axis=0))
    return row / tl.maximum(norm, NORM_EPS), norm


@jit
def write_memory_kernel(
    memory_pointer, shadow_pointer, local_pointer, labels_pointer, alpha_pointer,
    batch, classes, channels, local_stride_b, local_stride_i, local_stride_c, labels_stride,
    STRIPES: tl.constexpr, NORM_EPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """memory (n, N, C) float32, shadow (n, N, C) or None, local (B, n, C), labels (B,) integer, alpha 0-d float32."""
    sample = tl.program_id(0) // STRIPES
    stripe = tl.program_id(0) % STRIPES
    label = tl.load(labels_pointer + tl.cast(sample, tl.int64) * labels_stride).to(tl.int64)
    leads = (label >= 0) & (label < classes)
    for start in range(0, sample, BLOCK_B):
        earlier = start + tl.arange(0, BLOCK_B)
        labels = tl.load(labels_pointer + earlier.to(tl.int64) * labels_stride, mask=earlier < sample, other=-1)
        leads = leads & (tl.sum((labels.to(tl.int64) == label).to(tl.int32), axis=0) == 0)
    if leads:
        channel = tl.arange(0, BLOCK_C)
        channel_mask = channel < channels
        local_row = local_pointer + tl.cast(stripe, tl.int64) * local_stride_i + channel.to(tl.int64) * local_stride_c
        total = tl.zeros([BLOCK_C], tl.float32)
        instances = 0
        for other in range(sample, batch):
            is_instance = tl.load(labels_pointer + tl.cast(other, tl.int64) * labels_stride).to(tl.int64) == label
            if is_instance:
                feature = tl.load(local_row + tl.cast(other, tl.int64) * local_stride_b, mask=channel_mask, other=0.0)
                total += feature.to(tl.float32)
                instances += 1
        update, norm = unit_or_zero(total / instances, NORM_EPS)
        row = (tl.cast(stripe, tl.int64) * classes + label) * channels + channel
        old = tl.load(memory_pointer + row, mask=channel_mask, other=0.0)
        never_seen = tl.max((old != 0.0).to(tl.int32), axis=0) == 0
        alpha = tl.load(alpha_pointer)
        blended, _ = unit_or_zero(alpha * old + (1.0 - alpha) * update, NORM_EPS)
        new = tl.where(norm < NORM_EPS, old, tl.where(never_seen, update, blended))
        tl.store(memory_pointer + row, new, mask=channel_mask)
        if shadow_pointer is not None:
            tl.store(shadow_pointer + row, new, mask=channel_mask)


def launch_write(memory: Tensor, local_features: Tensor, labels: Tensor, alpha: Tensor, shadow: Tensor | None) -> None:
    """Writes memory and shadow in place."""
    stripes, classes, channels = memory.shape
    if channels > MAX_CHANNELS:
        raise ValueError(f"memory must have at most {MAX_CHANNELS} channels, got {channels}")
    batch = len(labels)
    chosen = write_configuration(current_target(memory), batch, channels)
    args = {
        "memory_pointer": memory,
        "shadow_pointer": shadow,
        "local_pointer": local_features,
        "labels_pointer": labels,
        "alpha_pointer": alpha,
        "batch": batch,
        "classes": classes,
        "channels": channels,
        "local_stride_b": local_features.stride(0),
        "local_stride_i": local_features.stride(1),
        "local_stride_c": local_features.stride(2),
        "labels_stride": labels.stride(0),
    }
    constants = {"STRIPES": stripes, "NORM_EPS": NORM_EPS, **chosen.blocks}
    launch(write_memory_kernel, (batch * stripes,), args, constants, chosen.options)


@torch.library.custom_op("cge_kernels::write_memory_", mutates_args=("memory", "shadow"))
def write_memory_op(
    memory: Tensor, local_features: Tensor, labels: Tensor, alpha: Tensor, shadow: Tensor | None
) -> None:
    # Looking at labels and alpha on a GPU would synchronise with the host; there the kernel masks wrong labels.
    if labels.device.type == "cpu":
        valid_labels(labels, memory.shape[1])
    if alpha.device.type == "cpu" and not 0 <= alpha.item() <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha.item()}")
    alpha = alpha.to(memory.device, memory.dtype)
    implementation(launch_write, cpu.write_memory_, memory, local_features)(
        memory, local_features, labels, alpha, shadow
    )


@write_memory_op.register_fake
def _(memory, local_features, labels, alpha, shadow):
    return None


def write_memory_(
    memory: Tensor, local_features: Tensor, labels: Tensor, alpha: float | Tensor, shadow: Tensor | None = None
) -> Tensor:
    """Writes the local features of one optimiser step into the class memory, in place (the paper's module NLC).

    For each identity y of the batch, with u_i = normalise(mean of its f_i):
    M[i,y] <- normalise(alpha * M[i,y] + (1 - alpha) * u_i).
    A zero row (class never seen) takes u_i whatever alpha is; a zero u_i leaves the row as it is. Call it after the
    backward pass: autograd still needs the memory that the forward pass read.

    Args:
        memory: (n, N, C), float32 (on ATen also float64), contiguous; written in place.
        local_features: (B, n, C), floating.
        labels: (B,), integer, in [0, N).
        alpha: a number or a 0-d tensor in [0, 1]: how much of the old row stays.
        shadow: (n, N, C), floating, contiguous, or None: a copy in a smaller dtype whose written rows are refreshed.

    Returns:
        memory itself.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ranks, shapes or devices do not fit, memory or shadow is not contiguous, alpha (a number or on the
            CPU) is outside [0, 1], or (on the CPU) a label is outside [0, N); on a GPU such a sample writes nothing.
    """
    require_memory("memory", memory)
    if memory.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"memory must be float32 or float64 (a smaller dtype loses increments), got {memory.dtype}")
    require_tensor("local_features", local_features, "(B, n, C)")
    require_tensor("labels", labels, "(B,)", "an integer")
    require_same_device(memory=memory, local_features=local_features, labels=labels)
    stripes, _, channels = memory.shape
    batch = local_features.shape[0]
    require_shape("local_features", local_features, (batch, stripes, channels), f"memory {tuple(memory.shape)}")
    require_shape("labels", labels, (batch,), f"local_features {tuple(local_features.shape)}")
    if shadow is not None:
        require_memory("shadow", shadow)
        require_shape("shadow", shadow, tuple(memory.shape), "memory")
        require_same_device(memory=memory, shadow=shadow)
    if not isinstance(alpha, Tensor):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {float(alpha)}")
        alpha = torch.full((), alpha, dtype=memory.dtype, device=memory.device)
    write_memory_op(memory, local_features.detach(), labels, alpha, shadow)
    return memory

"""The moving-average write of a batch's local features into the class memory.

For each identity y of the batch, u_i = normalise(mean of its f_i): M[i,y] <- normalise(momentum M[i,y] +
(1 - momentum) u_i). On a GPU one launch; on the CPU plain PyTorch.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import normalize

from cge_kernels.common.checks import (
    as_int64,
    check_labels,
    require_memory,
    require_same_device,
    require_shape,
    require_tensor,
)
from cge_kernels.common.dispatch import is_traced, runs_on_reference
from cge_kernels.common.launch import host_may_look
from cge_kernels.common.plan import Call, Plan
from cge_kernels.common.sharding import ClassShard, gather_equal, has_all_classes
from cge_kernels.write_memory.triton import launch_write

_constants: dict[tuple, Tensor] = {}

NORM_EPS = 1e-12  # a mean feature below this norm counts as zero: it has no direction


def write_on_cpu(
    memory: Tensor, local_features: Tensor, labels: Tensor, momentum: Tensor, low_precision_memory: Tensor | None
) -> None:
    """launch_write in plain PyTorch."""
    labels, features = labels.long(), local_features.to(memory.dtype)
    if not host_may_look(labels):  # else all are in range
        valid = (labels >= 0) & (labels < memory.shape[1])
        labels, features = labels[valid], features[valid]
    identities, instance_of, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = features.new_zeros(len(identities), *features.shape[1:]).index_add_(0, instance_of, features)
    means = (sums / counts.to(features.dtype)[:, None, None]).transpose(0, 1)
    norms = means.norm(dim=2, keepdim=True)
    update = means / norms.clamp(min=NORM_EPS)
    old = memory[:, identities]
    blended = normalize(update.lerp(old, momentum), dim=2, eps=NORM_EPS)
    rows = torch.where(old.any(dim=2, keepdim=True), blended, update)  # a row of zeros was never written
    rows = torch.where(norms < NORM_EPS, old, rows)
    memory[:, identities] = rows
    if low_precision_memory is not None:
        low_precision_memory[:, identities] = rows.to(low_precision_memory.dtype)


def write(
    call: Call, memory: Tensor, local_features: Tensor, labels: Tensor, momentum: Tensor,
    low_precision_memory: Tensor | None,
) -> None:  # fmt: skip
    check_labels(labels, memory.shape[1])  # where nobody looks, the kernel masks wrong ones
    if host_may_look(momentum) and not 0 <= momentum.item() <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum.item()}")
    arguments = memory, local_features, labels, momentum.to(memory.device, memory.dtype), low_precision_memory
    if runs_on_reference():
        import cge_reference

        cge_reference.write_memory_(*arguments)
    elif call.runs_on_triton(arguments):
        with Plan(call) as plan:
            launch_write(plan, *arguments)
    else:
        with call.autocast_off():
            write_on_cpu(*arguments)


@torch.library.custom_op("cge_kernels::write_memory_", mutates_args=("memory", "low_precision_memory"))
def write_memory_op(
    memory: Tensor, local_features: Tensor, labels: Tensor, momentum: Tensor, low_precision_memory: Tensor | None
) -> None:
    arguments = memory, local_features, labels, momentum, low_precision_memory
    write(Call.of("write_memory_", *arguments), *arguments)


@write_memory_op.register_fake
def _(memory, local_features, labels, momentum, low_precision_memory):
    return None


def check_write(memory: Tensor, local_features: Tensor, labels: Tensor, low_precision_memory: Tensor | None) -> None:
    """Raises as `write_memory_` says."""
    require_memory("memory", memory)
    if memory.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"memory must be float32 or float64 (a smaller dtype loses increments), got {memory.dtype}")
    require_tensor("local_features", local_features, "(B, n, C)")
    require_tensor("labels", labels, "(B,)", "an integer")
    require_same_device(memory=memory, local_features=local_features, labels=labels)
    stripes, _, channels = memory.shape
    batch = len(local_features)
    require_shape("local_features", local_features, (batch, stripes, channels), f"memory {tuple(memory.shape)}")
    require_shape("labels", labels, (batch,), f"local_features {tuple(local_features.shape)}")
    if low_precision_memory is not None:
        require_memory("low_precision_memory", low_precision_memory)
        require_shape("low_precision_memory", low_precision_memory, tuple(memory.shape), "memory")
        require_same_device(memory=memory, low_precision_memory=low_precision_memory)


def write_memory_(
    memory: Tensor, local_features: Tensor, labels: Tensor, momentum: float | Tensor,
    low_precision_memory: Tensor | None = None, shard: ClassShard | None = None,
) -> Tensor:  # fmt: skip
    """Writes the local features of one optimizer step into the class memory, in place (the paper's module NLC).

    For each identity y of the batch, with u_i = normalise(mean of its f_i):
    M[i,y] <- normalise(momentum * M[i,y] + (1 - momentum) * u_i).
    A zero row (class never seen) takes u_i whatever the momentum is; a zero u_i leaves the row as it is. Call it after
    the backward pass: autograd still needs the memory that the forward pass read.

    With a shard, memory and low_precision_memory are the rows of this rank's classes; the local features and labels of
    all ranks are gathered, and each rank writes what belongs to its rows.

    Args:
        memory: (n, N, C), float32 (with the backend cpu also float64), contiguous; written in place.
        local_features: (B, n, C), floating. With a shard as many on every rank.
        labels: (B,), integer, in [0, N), with a shard of all classes.
        momentum: a number or a 0-d tensor in [0, 1], how much of the old row stays: the paper's alpha.
        low_precision_memory: (n, N, C), floating, contiguous, or None: a copy of the memory in a smaller dtype, whose
            written rows are refreshed.
        shard: which classes this rank has; None if all of them.

    Returns:
        memory itself.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ranks, shapes or devices do not fit, a memory is not contiguous, the momentum (a number or on the
            CPU) is outside [0, 1], or (on the CPU) a label is outside [0, N), or the ranks have different numbers of
            samples; on a GPU a sample of such a label writes nothing.
    """
    tensors = memory, local_features, as_int64(labels), low_precision_memory
    labels = tensors[2]
    given = momentum if isinstance(momentum, Tensor) else None
    call = None if is_traced(*tensors, given) else Call.of("write_memory_", *tensors, given)
    if call is None or not call.is_checked:
        check_write(*tensors)
    if not isinstance(momentum, Tensor):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {float(momentum)}")
        make = torch.full if call is None else constant
        momentum = make((), float(momentum), dtype=memory.dtype, device=memory.device)
    local_features = local_features.detach()
    if not has_all_classes(shard, memory):
        local_features, labels = of_own_classes(local_features, labels, shard)
        call = Call.of("write_memory_", memory, local_features, labels, low_precision_memory, given)
    if call is None:
        write_memory_op(memory, local_features, labels, momentum, low_precision_memory)
    else:
        call.is_checked = True
        write(call, memory, local_features, labels, momentum, low_precision_memory)
        increment_version(memory if low_precision_memory is None else (memory, low_precision_memory))
    return memory


def constant(shape: tuple[()], number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.full, remembered; but a CUDA graph in capture gets one of its own, which nobody else lets go of."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.full(shape, number, dtype=dtype, device=device)
    key = number, dtype, device
    made = _constants.get(key)
    if made is None:
        _constants.clear()  # momentum changes once an epoch: only the last one is worth keeping
        made = _constants[key] = torch.full(shape, number, dtype=dtype, device=device)
    return made


def of_own_classes(local_features: Tensor, labels: Tensor, shard: ClassShard) -> tuple[Tensor, Tensor]:
    """Local features and labels of all ranks, of which only samples of this rank's classes have a label in range."""
    local_features, labels = gather_equal(local_features, shard.group), gather_equal(labels, shard.group)
    check_labels(labels, shard.classes)
    labels = labels.long() - shard.first
    is_own = (labels >= 0) & (labels < shard.count)
    if host_may_look(labels):
        return local_features[is_own], labels[is_own]
    return local_features, torch.where(is_own, labels, -1)  # choosing would synchronise with the host

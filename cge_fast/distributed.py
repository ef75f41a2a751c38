"""What the ranks of a torch.distributed run tell each other; with one process everything here is the identity.

Class sharding: of classifier and memory each rank has the rows of some classes. Features, local features and labels of
all ranks are gathered, each rank streams over its own classes, and what is reduced over the ranks are the statistics of
each sample's softmax: the highest logit, the sum of exponentials, the sum of logits and the label's logit.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cge_kernels.cross_entropy.backward import revised_cross_entropy_backward_op
from cge_kernels.cross_entropy.op import loss_of_statistics, revised_statistics_op, valid_labels


def rank() -> int:
    """This process's number, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenates the ranks' tensors along dimension 0, in rank order; their lengths may differ. No gradient."""
    if world_size() == 1:
        return tensor
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    lengths = torch.cat(lengths).tolist()
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    """All-gather of equal lengths whose backward sums over ranks what each of them sends back to this rank's part."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenates the ranks' tensors of equal length along dimension 0, differentiably.

    With DistributedDataParallel, which averages gradients over ranks, a loss of the gathered batch that every rank
    computes whole has the gradient that one process would have had.
    """
    return tensor if world_size() == 1 else _GatherWithGradient.apply(tensor)


def barrier() -> None:
    """Returns when every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(tensor: Tensor) -> None:
    """Replaces every rank's tensor by the sum of all ranks'."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Overwrites every rank's tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class Shard(NamedTuple):
    """A rank's classes: `count` of all N `classes`, from `first` on."""

    first: int
    count: int
    classes: int

    @property
    def rows(self) -> slice:
        """Which rows of the whole they are."""
        return slice(self.first, self.first + self.count)


def shard_of(classes: int, number: int | None = None, ranks: int | None = None) -> Shard:
    """The classes of rank `number` of `ranks` (by default this one): N // R, one more for the first N % R ranks.

    Raises:
        ValueError: there are fewer classes than ranks.
    """
    number, ranks = rank() if number is None else number, world_size() if ranks is None else ranks
    if classes < ranks:
        raise ValueError(f"shard_classes: {classes} identities cannot be shared out among {ranks} ranks")
    share, left = divmod(classes, ranks)
    return Shard(number * share + min(number, left), share + (number < left), classes)


def collect_rows(rows: Tensor, shard: Shard, axis: int) -> Tensor | None:
    """On rank 0, on the CPU, the whole of what each rank has its classes' rows of along an axis; None elsewhere.

    Rank after rank, so that no device must hold more than its own rows and one other's.
    """
    if rank() > 0:
        dist.send(rows.contiguous(), 0)
        return None
    parts = [rows.cpu()]
    for sender in range(1, world_size()):
        shape = list(rows.shape)
        shape[axis] = shard_of(shard.classes, sender).count
        received = rows.new_empty(shape)
        dist.recv(received, sender)
        parts.append(received.cpu())
    return torch.cat(parts, dim=axis)


def require_equal(**sizes: int) -> None:
    """Raises ValueError, the same on every rank, unless all ranks gave the same sizes."""
    if world_size() == 1:
        return
    found: list[dict[str, int]] = [{} for _ in range(world_size())]
    dist.all_gather_object(found, sizes)
    for name in sizes:
        values = [numbers[name] for numbers in found]
        if len(set(values)) > 1:
            raise ValueError(f"{name}: must be the same on every rank, got {', '.join(map(str, values))}")


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on one rank or more."""
    count = torch.tensor(float(flag), device=device)
    sum_over_ranks(count)
    return count.item() > 0


def gather_equal(tensor: Tensor) -> Tensor:
    """Concatenates the ranks' tensors of one shape along dimension 0, in rank order. No gradient."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def reduce_to_own(tensor: Tensor) -> Tensor:
    """The sum over ranks of the part along dimension 0 that this rank gave to `gather_equal`."""
    parts = list(tensor.contiguous().chunk(world_size()))
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts)
    return own


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, local_features, memory, labels, label_smoothing, local_gradient, shard):
        features, local_features, labels = map(gather_equal, (features, local_features, labels))
        valid_labels(labels, shard.classes)
        *statistics, kept, scale = revised_statistics_op(
            features, weight, local_features, memory, labels, None, shard.first
        )
        reduced = reduce_statistics(*statistics, shard.classes)
        loss, log_sum, hit, local_hit = loss_of_statistics(*reduced, labels, shard.classes, label_smoothing)
        ctx.settings = label_smoothing, shard.first, shard.classes, local_gradient
        ctx.save_for_backward(log_sum, features, weight, local_features, memory, labels, None, kept, scale)
        ctx.mark_non_differentiable(hit, local_hit)
        return loss, hit, local_hit

    @staticmethod
    def backward(ctx, grad, *_):
        label_smoothing, first, classes, local_gradient = ctx.settings
        local_gradient = local_gradient and ctx.needs_input_grad[2]
        grad_features, grad_weight, grad_local, _ = revised_cross_entropy_backward_op(
            grad.contiguous(), *ctx.saved_tensors, label_smoothing, first, classes, local_gradient
        )
        grad_features = reduce_to_own(grad_features).mul_(world_size())
        grad_local = reduce_to_own(grad_local).mul_(world_size()) if local_gradient else None
        return grad_features, grad_weight, grad_local, *(None,) * 5


def reduce_statistics(
    highest: Tensor, winner: Tensor, sums: Tensor, target: Tensor, classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics over all classes, on every rank, from those of each rank's (`revised_statistics_op`)."""
    own_highest = highest
    highest = highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    winner = torch.where(own_highest == highest, winner, classes)  # of ranks that tie the lowest class wins
    dist.all_reduce(winner, dist.ReduceOp.MIN)
    exponentials = sums[0] * (own_highest[0] - highest[0]).exp()
    summed = torch.stack([exponentials, sums[1], target])
    dist.all_reduce(summed)
    return highest, winner, summed[:2], summed[2]


def sharded_cross_entropy(
    features: Tensor,
    weight: Tensor,
    local_features: Tensor,
    memory: Tensor,
    labels: Tensor,
    shard: Shard,
    label_smoothing: float = 0.1,
    local_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cge_kernels.revised_cross_entropy` of the samples of all ranks, where each has some of the classes.

    Every rank must derive the same number from the loss and call backward on it. With DistributedDataParallel, which
    averages gradients over ranks, the features receive R times the gradient; that of the weight is the true one, so the
    weight stays outside of it.

    Args:
        features: (B, C), floating: this rank's samples, as many on every rank.
        weight: (count, C), floating: the classifier's rows of this rank's classes.
        local_features: (B, n, C), floating.
        memory: (n, count, C), floating, contiguous: the same rows of the memory; only read.
        labels: (B,), integer, in [0, N).
        shard: this rank's classes.
        label_smoothing: e, in [0, 1].
        local_gradient: whether the gradient flows through w to the local features.

    Returns:
        loss (R*B,), hit (R*B,) and local_hit (R*B, n) of all ranks' samples, in rank order, the same on every rank.

    Raises:
        ValueError, on every rank: (on the CPU) a label of any rank is outside [0, N), or the ranks have different
            numbers of samples. On a GPU, where looking would synchronise, the loss of such a label is NaN.
    """
    if labels.device.type == "cpu":
        require_equal(samples=len(labels))
    return _ShardedCrossEntropy.apply(
        features, weight, local_features, memory, labels, label_smoothing, local_gradient, shard
    )

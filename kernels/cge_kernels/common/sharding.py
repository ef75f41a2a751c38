"""Classes shared out among the ranks of a torch.distributed run, and what the ranks send each other."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from cge_kernels.common.dispatch import runs_on_reference


@dataclass(frozen=True)
class ClassShard:
    """One rank's classes: `count` of all N `classes`, from `first` on; the ranks are those of the process group.

    group: a torch.distributed process group, or None for all ranks.
    """

    first: int
    count: int
    classes: int
    group: Any = None

    @property
    def rows(self) -> slice:
        """Which rows of the whole classifier and memory they are."""
        return slice(self.first, self.first + self.count)

    @classmethod
    def of_rank(cls, classes: int, rank: int, ranks: int, group: Any = None) -> Self:
        """The classes of one rank of `ranks`: N // R, one more for each of the first N % R ranks.

        Raises:
            ValueError: there are fewer classes than ranks.
        """
        if classes < ranks:
            raise ValueError(f"classes must be at least one for each rank, got {classes} for {ranks} ranks")
        share, left = divmod(classes, ranks)
        return cls(rank * share + min(rank, left), share + (rank < left), classes, group)


def has_all_classes(shard: ClassShard | None, memory: Tensor) -> bool:
    """Whether this rank has all classes, so that the ranks have nothing to tell each other.

    Raises ValueError if the memory (n, N, C) has other classes than the shard, or where a shard cannot be used: without
    torch.distributed, or with the backend "reference".
    """
    if shard is None:
        return True
    if memory.shape[1] != shard.count:
        raise ValueError(f"memory must have the shard's {shard.count} classes, got {memory.shape[1]}")
    if shard.count == shard.classes:
        return True
    if runs_on_reference():
        raise ValueError("shard must be None with the backend reference, which knows no sharding")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"shard has {shard.count} of {shard.classes} classes, but torch.distributed is not initialised"
        )
    return False


def gather_equal(tensor: Tensor, group: Any = None) -> Tensor:
    """Concatenates the ranks' tensors of one shape along dimension 0, in rank order. No gradient.

    Raises ValueError, the same on every rank, if tensors on the CPU differ in length. Looking at the lengths would make
    the host wait for a GPU; there the ranks then wait for each other until the process group's timeout.
    """
    ranks = dist.get_world_size(group)
    if tensor.device.type == "cpu":
        lengths: list[int] = [0] * ranks
        dist.all_gather_object(lengths, len(tensor), group=group)
        if len(set(lengths)) > 1:
            raise ValueError(f"samples: must be the same on every rank, got {', '.join(map(str, lengths))}")
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts)


def reduce_to_own(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum over ranks of the part along dimension 0 that this rank gave to `gather_equal`."""
    parts = list(tensor.contiguous().chunk(dist.get_world_size(group)))
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own

"""What the ranks of a torch.distributed run tell each other; with one process everything here is the identity."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cge_kernels import ClassShard
from cge_kernels.common import sharding


def rank() -> int:
    """This process's number, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenates the ranks' tensors of one shape along dimension 0, in rank order. No gradient.

    Raises:
        ValueError: the lengths differ; only on the CPU, since a GPU would have to wait for the host to look at them.
    """
    return tensor if world_size() == 1 else sharding.gather_equal(tensor)


class _GatherWithGradient(torch.autograd.Function):
    """All-gather of equal lengths whose backward sums over ranks what each of them sends back to this rank's part."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return sharding.gather_equal(tensor)

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


def inside_ddp(parameter: nn.Parameter) -> bool:
    """Whether a module in DistributedDataParallel that has the parameter is running its forward."""
    ddp = DistributedDataParallel._get_active_ddp_module()
    return ddp is not None and any(one is parameter for one in ddp.module.parameters())


@contextmanager
def every_rank_has_samples() -> Iterator[None]:
    """Inside, SyncBatchNorm does not look for ranks without samples, which in every layer would wait for the GPU.

    It leaves this out itself while a CUDA graph is captured, so here it is told that one is.
    """
    if world_size() == 1 or not torch.cuda.is_available():
        yield
        return
    is_capturing = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = is_capturing


@contextmanager
def without_gradient_sync(*modules: nn.Module) -> Iterator[None]:
    """Inside, those that are in DistributedDataParallel add up their gradients without exchanging them."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


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


def collect_rows(rows: Tensor, shard: ClassShard, axis: int) -> Tensor | None:
    """On rank 0, on the CPU, the whole of what each rank has its classes' rows of along an axis; None elsewhere.

    Rank after rank, so that no device must hold more than its own rows and one other's.
    """
    if rank() > 0:
        dist.send(rows.contiguous(), 0)
        return None
    parts = [rows.cpu()]
    for sender in range(1, world_size()):
        shape = list(rows.shape)
        shape[axis] = ClassShard.of_rank(shard.classes, sender, world_size()).count
        received = rows.new_empty(shape)
        dist.recv(received, sender)
        parts.append(received.cpu())
    return torch.cat(parts, dim=axis)


def require_equal(**sizes: int) -> None:
    """Raises ValueError, the same on every rank, unless all ranks gave the same sizes."""
    if world_size() == 1:
        return
    of_ranks: list[dict[str, int]] = [{} for _ in range(world_size())]
    dist.all_gather_object(of_ranks, sizes)
    for name in sizes:
        values = [numbers[name] for numbers in of_ranks]
        if len(set(values)) > 1:
            raise ValueError(f"{name}: must be the same on every rank, got {', '.join(map(str, values))}")


def gather_dicts(mine: dict[str, str]) -> dict[str, str]:
    """The entries of all ranks' dicts."""
    of_ranks = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(of_ranks, mine)
    return {key: value for entries in of_ranks for key, value in entries.items()}


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on one rank or more."""
    count = torch.tensor(float(flag), device=device)
    sum_over_ranks(count)
    return count.item() > 0

"""Classes shared out among ranks: the loss, the gradients and the memory that one process has."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from error_budget import budget
from support import KERNEL_DEVICE, RANKS_TIMEOUT, on_ranks
from torch.nn.functional import normalize

import cge_kernels
import cge_reference
from cge_kernels import ClassShard

CLASSES, BATCH, CHANNELS, STRIPES = 11, 12, 5, 3
LEAVES = ("features", "weight", "local_features", "bias")


def problem():
    """Arguments of the whole batch and all classes; labels at the shards' edges."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    memory = normalize(draw(STRIPES, CLASSES, CHANNELS), dim=2)
    memory[:, 4] = 0
    tensors = {
        "features": 3 * draw(BATCH, CHANNELS),
        "weight": draw(CLASSES, CHANNELS),
        "local_features": draw(BATCH, STRIPES, CHANNELS),
        "memory": memory,
        "labels": torch.tensor([0, 2, 3, 5, 6, 8, 9, 10, 10, 4, 7, 1]),
        "bias": draw(CLASSES),
    }
    return {name: tensor.to(KERNEL_DEVICE) for name, tensor in tensors.items()}  # of a rank the CPU


def share(rank):
    """This rank's classes, and its samples."""
    ranks = dist.get_world_size()
    shard = ClassShard.of_rank(CLASSES, rank, ranks)
    if ranks == 3:  # any shares will do, also of one class
        shard = [ClassShard(0, 7, CLASSES), ClassShard(7, 1, CLASSES), ClassShard(8, 3, CLASSES)][rank]
    return shard, slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)


def own_arguments(rank, whole):
    """This rank's samples, and its rows of what has a row for each class."""
    shard, own = share(rank)
    rows = {name: whole[name][shard.rows] for name in ("weight", "bias") if whole.get(name) is not None}
    samples = {name: whole[name][own] for name in ("features", "local_features", "labels")}
    memory = whole["memory"][:, shard.rows].contiguous()
    return {**whole, **rows, **samples, "memory": memory, "shard": shard}


def compare_losses_and_gradients(rank, **options):
    whole = problem() | options
    allowed = budget("revised_cross_entropy", whole)
    shard, own = share(rank)
    arguments = own_arguments(rank, whole)
    leaves = {name: arguments[name].clone().requires_grad_() for name in LEAVES if arguments[name] is not None}
    loss, correct, stripe_correct = cge_kernels.revised_cross_entropy(**arguments | leaves)
    loss.backward(allowed.upstream["loss"])
    allowed.check("loss", loss.detach())
    allowed.check("correct", correct)
    allowed.check("stripe_correct", stripe_correct)
    for name in leaves:
        gradient = leaves[name].grad
        if name in ("weight", "bias"):
            allowed.check(f"grad_{name}", gradient, shard.rows)
        else:  # DistributedDataParallel averages what comes of these over the ranks afterwards
            ranks = dist.get_world_size()
            allowed.check(f"grad_{name}", None if gradient is None else gradient / ranks, own)


def compare_written_memories(rank):
    whole = problem()
    shard, own = share(rank)
    expected, memory = whole["memory"].clone(), whole["memory"][:, shard.rows].contiguous()
    rounded = memory.bfloat16()
    arguments = memory, whole["local_features"][own], whole["labels"][own], 0.5, rounded
    for _ in range(2):
        cge_reference.write_memory_(expected, whole["local_features"], whole["labels"], 0.5)
        assert cge_kernels.write_memory_(*arguments, shard) is memory
    torch.testing.assert_close(memory, expected[:, shard.rows], rtol=0, atol=1e-6)
    torch.testing.assert_close(rounded.float(), memory, rtol=2**-7, atol=0)
    uneven = memory, *(tensor[rank:] for tensor in arguments[1:3]), *arguments[3:]
    with pytest.raises(ValueError, match="samples: must be the same on every rank, got"):
        cge_kernels.write_memory_(*uneven, shard)


def compare_everything(rank, backend):
    with cge_kernels.backend(backend):
        for label_smoothing in (0.0, 0.1):
            for local_gradient in (True, False):
                options = {"label_smoothing": label_smoothing, "local_gradient": local_gradient}
                compare_losses_and_gradients(rank, **options)
        compare_losses_and_gradients(rank, bias=None)
        compare_written_memories(rank)


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [
        ("cpu", 2),
        ("cpu", 3),
        pytest.param("cpu", 4, marks=pytest.mark.slow),
        pytest.param("triton", 3, marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_loss_the_gradients_and_the_memory_of_one_process(backend, ranks, tmp_path):
    on_ranks(ranks, compare_everything, backend, folder=tmp_path)


def test_a_shard_of_all_classes_is_no_shard(backend):
    whole = problem()
    shard = ClassShard.of_rank(CLASSES, 0, 1)
    for name, arguments in (
        ("revised_cross_entropy", whole),
        ("write_memory_", {name: whole[name] for name in ("memory", "local_features", "labels")} | {"momentum": 0.5}),
    ):
        results = []
        for chosen in (None, shard):
            memory = whole["memory"].clone()
            values = getattr(cge_kernels, name)(**arguments | {"memory": memory, "shard": chosen})
            results.append([*(values if isinstance(values, tuple) else (values,)), memory])
        assert all(a.equal(b) for a, b in zip(*results, strict=True))


def errors_on_every_rank(rank):
    arguments = own_arguments(rank, problem())
    wrong = arguments["labels"].clone()
    wrong[0] = CLASSES if rank == 1 else 2
    message = rf"labels must lie in \[0, {CLASSES}\), got {CLASSES}"
    with pytest.raises(ValueError, match=message):
        cge_kernels.revised_cross_entropy(**arguments | {"labels": wrong})
    memory, local_features, shard = (arguments[name] for name in ("memory", "local_features", "shard"))
    before = memory.clone()
    with pytest.raises(ValueError, match=message):
        cge_kernels.write_memory_(memory, local_features, wrong, 0.5, shard=shard)
    assert memory.equal(before)
    fewer = {name: arguments[name][: 5 + rank] for name in ("features", "local_features", "labels")}
    with pytest.raises(ValueError, match="must be the same on every rank, got 5, 6"):
        cge_kernels.revised_cross_entropy(**arguments | fewer)
    with cge_kernels.backend("reference"), pytest.raises(ValueError, match="shard must be None with the backend ref"):
        cge_kernels.revised_cross_entropy(**arguments)


def test_wrong_labels_and_sizes_are_errors_on_every_rank(tmp_path):
    start_time = time.monotonic()
    on_ranks(2, errors_on_every_rank, folder=tmp_path)
    assert time.monotonic() - start_time < RANKS_TIMEOUT


def test_a_shard_without_a_process_group_is_an_error():
    shard = ClassShard.of_rank(CLASSES, 0, 2)
    arguments = problem()
    arguments |= {"weight": arguments["weight"][shard.rows], "memory": arguments["memory"][:, shard.rows].contiguous()}
    with pytest.raises(ValueError, match=r"shard has 6 of 11 classes, but torch\.distributed is not init"):
        cge_kernels.revised_cross_entropy(**arguments | {"bias": None, "shard": shard})


def die_in_the_second_step(rank, folder):
    arguments = own_arguments(rank, problem())
    for step in range(2):
        if step == 1 and rank == 1:
            os._exit(1)
        try:
            features = arguments["features"].clone().requires_grad_()
            cge_kernels.revised_cross_entropy(**arguments | {"features": features})[0].mean().backward()
        except RuntimeError as error:
            (folder / "error").write_text(str(error))
            raise


def test_a_rank_that_dies_in_mid_step_ends_the_others_with_an_error(tmp_path):
    start_time = time.monotonic()
    context = on_ranks(2, die_in_the_second_step, tmp_path, folder=tmp_path, join=False)
    for process in context.processes:
        process.join(RANKS_TIMEOUT)
    assert time.monotonic() - start_time < RANKS_TIMEOUT
    assert [process.exitcode for process in context.processes] == [1, 1]
    assert (tmp_path / "error").read_text()

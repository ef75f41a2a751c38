"""What a rank needs, by formula and as it is measured."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from bench import sharding
from bench.measure import Contender, extra_bytes
from bench.sharding import need
from cge_fast.losses.cge import CGELoss
from cge_fast.model import Embeddings
from cge_kernels import ClassShard


def test_the_formulas_by_hand(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "1")
    found = need(classes=10, ranks=3, batch=2, channels=5, stripes=2)
    assert found["state"] == 4 * 5 * 4 * 6  # 4 rows of 5 numbers: classifier, gradient, two moments, two stripes
    assert found["features"] == 2 * 4 * 6 * 5 * 3
    assert found["scratch"] == 2 * 4 * 3 * 4 * 6
    # features and gradients of the other ranks' 4 samples, the write's local features, and the statistics twice
    assert found["received"] == 4 * (2 * 4 * 5 * 3 + 4 * 5 * 2 + 2 * (12 * 3 + 12))
    assert found["computed"] == 2 * 6 * 4 * 5 * 11


def test_scratch_stays_within_its_budget_and_the_rest_falls_with_the_ranks():
    one, many = need(10**8, 8, 64, 2048, 3), need(10**8, 64, 64, 2048, 3)
    assert one["scratch"] == many["scratch"] == 256 << 20
    assert one["state"] == 8 * many["state"]
    assert one["computed"] == many["computed"]  # the batch grows as the rows shrink


def test_every_size_is_computed():
    figures = list(sharding.measure(64, 2048, 3))
    assert len({figure.subject for figure in figures}) == len(sharding.CLASSES) * len(sharding.RANKS)
    one = {figure.quantity: figure.value for figure in figures if figure.subject == "N 1e+06, 8 GPUs"}
    assert one["held"] == one["state"] + one["features"] + one["scratch"]


@pytest.mark.slow
def test_what_two_processes_hold_and_receive_agrees_with_the_formulas(tmp_path):
    classes, batch, channels, stripes = sizes = 5003, 4, 64, 3
    processes.spawn(measure_rank, (sizes, tmp_path), nprocs=2)
    measured = [map(int, (tmp_path / str(rank)).read_text().split()) for rank in range(2)]
    held, received = map(max, zip(*measured, strict=True))
    formula = need(classes, 2, batch, channels, stripes)
    assert 0.8 * formula["held"] < held < 1.1 * formula["held"]
    assert received == pytest.approx(formula["received"], abs=0.1e6)


def measure_rank(rank: int, sizes: tuple[int, int, int, int], folder: Path) -> None:
    """Writes the most bytes of tensors that two steps of the sharded loss hold, and those that a step receives."""
    classes, batch, channels, stripes = sizes
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pooled = torch.rand(batch, channels, requires_grad=True)
    local = torch.rand(batch, stripes, channels, requires_grad=True)
    labels = torch.arange(batch) * 2 + rank
    received = 0

    def count(name: str):
        original = getattr(dist, name)

        def counted(*arguments, **options):
            nonlocal received
            tensors = arguments[0] if name != "reduce_scatter" else arguments[1]
            parts = tensors if isinstance(tensors, list) else [tensors]
            share = sum(part.nbytes for part in parts) // 2
            received += 2 * share if name == "all_reduce" else share
            return original(*arguments, **options)

        return patch.object(dist, name, counted)

    def train() -> None:
        loss = CGELoss(channels, classes, stripes, shard=ClassShard.of_rank(classes, rank, 2))
        optimizer = torch.optim.Adam(loss.parameters(), fused=True)
        for _ in range(2):  # Adam's moments are there from the second on
            loss(Embeddings(pooled, local, pooled), labels).loss.backward()
            optimizer.step()
            loss.write_memory(local, labels, momentum=0.5)
            optimizer.zero_grad()

    with count("all_gather"), count("all_reduce"), count("reduce_scatter"):
        held = extra_bytes(Contender(train))
    (folder / str(rank)).write_text(f"{held} {received // 2}")
    dist.destroy_process_group()

"""Memory and traffic of one rank where classes are sharded, for 1e5 to 1e8 identities on 1 to 1,024 GPUs, by formula.

A rank holds k = ceil(N / R) rows of classifier and memory, and all ranks' B = R b samples. In float32, with Adam:

- state: 4 C k (4 + n) bytes: the classifier, its gradient, Adam's two moments, and n stripes of the memory;
- features: 8 B C (1 + n): features and local features of all ranks, and their gradients;
- scratch: CGE_SCRATCH_MB at most, half of it for logits and scores, kept or computed again, and half for their
  gradients (the CPU takes these in small chunks and needs less);
- received: 4 (R - 1) b C (1 + n) of the features, as much of the gradients that the ranks sum for one another, once
  more 4 (R - 1) b C n for the memory's write, and of the statistics' reductions, as a ring moves them, 2 (R - 1) b
  (12 (n + 1) + 12): for each sample the highest value and its class of n + 1 classifiers, and three sums;
- FLOPs: 2 B k C (2 (1 + n) + 1 + 2 + n) = 2 b N C (3 n + 5): scores, scores again, and the gradients of classifier,
  features and local features. The batch grows with R as the rows shrink: sharding saves memory, not time.

With --ranks two steps of the sharded loss run in gloo processes of one thread each, beside the formulas. Held: the most
bytes of tensors at a time, from the empty process on. Received: in one step.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bench.measure import Contender, peak_bytes
from bench.results import Figure
from cge_fast.errors import UserError
from cge_fast.losses.cge import CGELoss
from cge_fast.model import Embeddings
from cge_kernels import ClassShard, scratch_bytes

CLASSES = [10**5, 10**6, 10**7, 10**8]
RANKS = [1, 8, 64, 1024]


@dataclass(frozen=True)
class Need:
    """Of one rank: bytes, and FLOPs of a step."""

    state: int
    features: int
    scratch: int
    received: int
    flops: int

    @property
    def held(self) -> int:
        """Bytes at a time, at most."""
        return self.state + self.features + self.scratch


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench sharding`."""
    parser.add_argument("--batch", type=PositiveInt, default=64, help="b, samples of one rank")
    parser.add_argument("--channels", type=PositiveInt, default=2048, help="C")
    parser.add_argument("--stripes", type=PositiveInt, default=3, help="n")
    parser.add_argument("--ranks", type=PositiveInt, nargs="+", default=[], help="how many to run and measure")
    parser.add_argument("--classes", type=PositiveInt, default=100_003, help="N that is measured")


def measure(batch: int, channels: int, stripes: int, ranks: list[int], classes: int) -> Iterator[Figure]:
    """By formula for many sizes, or measured beside the formula for the given ranks."""
    if ranks and classes < max(ranks) * batch:
        raise UserError(f"classes: must be at least ranks times batch, got {classes}")
    setting = f"b {batch}, C {channels}, n {stripes}"
    for count in ranks:
        needed = need(classes, count, batch, channels, stripes)
        place = "sharding, measured", setting, f"N {classes:,}, {count} ranks"
        held, received = measure_ranks(count, (classes, batch, channels, stripes))
        yield Figure(*place, "formula", "held", "B", needed.held)
        yield Figure(*place, "measured", "held", "B", held)
        yield Figure(*place, "formula", "received", "B", needed.received)
        yield Figure(*place, "measured", "received", "B", received)
    for number, count in [] if ranks else [(number, count) for number in CLASSES for count in RANKS]:
        needed = need(number, count, batch, channels, stripes)
        place = "sharding", setting, f"N {number:.0e}", f"{count:,} GPUs"
        for quantity in ("state", "features", "scratch", "held", "received"):
            yield Figure(*place, quantity, "B", getattr(needed, quantity))
        yield Figure(*place, "computed", "FLOP", needed.flops)


def need(classes: int, ranks: int, batch: int, channels: int, stripes: int) -> Need:
    """By the formulas above; batch: b, of one rank."""
    rows, samples = ceil(classes / ranks), batch * ranks
    width = channels * (1 + stripes)
    statistics = 12 * (stripes + 1) + 12
    return Need(
        state=4 * channels * rows * (4 + stripes),
        features=8 * samples * width,
        scratch=min(scratch_bytes(), 8 * (stripes + 1) * rows * samples),
        received=(ranks - 1) * batch * (8 * width + 4 * channels * stripes + 2 * statistics),
        flops=2 * samples * rows * channels * (3 * stripes + 5),
    )


def measure_ranks(ranks: int, sizes: tuple[int, int, int, int]) -> tuple[int, int]:
    """Bytes held and received of the rank that has most; sizes: N, b, C, n."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(measure_rank, (ranks, sizes, folder), nprocs=ranks)
        found = [map(int, (Path(folder) / str(rank)).read_text().split()) for rank in range(ranks)]
        held, received = zip(*found, strict=True)
    return max(held), max(received)


def measure_rank(rank: int, ranks: int, sizes: tuple[int, int, int, int], folder: str) -> None:
    """One process: writes its held and received bytes to a file."""
    classes, batch, channels, stripes = sizes
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    pooled = torch.rand(batch, channels, requires_grad=True)
    local = torch.rand(batch, stripes, channels, requires_grad=True)
    labels = torch.arange(batch) * ranks + rank
    received = 0

    def count(name: str):
        original = getattr(dist, name)

        def counted(*arguments, **options):
            nonlocal received
            tensors = arguments[0] if name != "reduce_scatter" else arguments[1]
            parts = tensors if isinstance(tensors, list) else [tensors]
            share = sum(part.nbytes for part in parts) * (ranks - 1) // ranks
            received += 2 * share if name == "all_reduce" else share
            return original(*arguments, **options)

        return patch.object(dist, name, counted)

    def train() -> None:
        loss = CGELoss(channels, classes, stripes, shard=ClassShard.of_rank(classes, rank, ranks))
        optimizer = torch.optim.Adam(loss.parameters(), fused=True)
        for _ in range(2):  # Adam's moments are there from the second on
            loss(Embeddings(pooled, local, pooled), labels).loss.backward()
            optimizer.step()
            loss.write_memory(local, labels, momentum=0.5)
            optimizer.zero_grad()

    with count("all_gather"), count("all_reduce"), count("reduce_scatter"):
        held = peak_bytes(Contender(train), torch.device("cpu"))
    (Path(folder) / str(rank)).write_text(f"{held} {received // 2}")
    dist.destroy_process_group()

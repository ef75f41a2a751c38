"""What a rank needs where classes are sharded, by formula and measured: python -m bench.sharding --help

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

`--measure` runs two steps of the sharded head in gloo processes of one thread each and prints what it held and, in one
step, received beside the formulas. Held: the most bytes of tensors at a time, from the empty process on, without the
feature map.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor

from bench.measure import Contender, peak_bytes
from bench.tables import table
from cge_fast import CGEHead, errors
from cge_fast.errors import UserError
from cge_kernels.common.tiles import scratch_bytes

PROGRAM = "bench.sharding"
CLASSES = [10**5, 10**6, 10**7, 10**8]
RANKS = [1, 8, 64, 1024]
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Of one rank: bytes, and FLOPs of a step."""

    state: int
    features: int
    scratch: int
    received: int
    flops: int


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


def rows(batch: int, channels: int, stripes: int) -> list[tuple[str, ...]]:
    """Rows of the table by formula."""
    found = []
    for classes in CLASSES:
        for ranks in RANKS:
            if ranks <= classes:
                n = need(classes, ranks, batch, channels, stripes)
                held = n.state + n.features + n.scratch
                sizes = (f"{size / GIB:,.2f}" for size in (n.state, n.features, n.scratch, held, n.received))
                found.append((f"{classes:.0e}", f"{ranks:,}", *sizes, f"{n.flops / 1e12:,.2f}"))
    return found


def step(head: CGEHead, optimizer: torch.optim.Optimizer, feature_map: Tensor, labels: Tensor) -> None:
    """Forward, backward, Adam and the memory's write."""
    output = head(feature_map, labels)
    output.loss.backward()
    optimizer.step()
    head.write_memory(output.local_features, labels, 1)
    optimizer.zero_grad()


def measure_rank(rank: int, ranks: int, sizes: tuple[int, int, int, int], folder: str) -> None:
    """One process: writes its held and received bytes to a file."""
    classes, batch, channels, stripes = sizes
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    feature_map = torch.rand(batch, channels, stripes, 1, requires_grad=True)
    labels = torch.arange(batch) * ranks + rank
    received = 0

    def count(name: str):
        original = getattr(dist, name)

        def counted(*arguments, **options):
            nonlocal received
            tensors = arguments[0] if name != "reduce_scatter" else arguments[1]
            parts = tensors if isinstance(tensors, list) else [tensors]
            whole = sum(part.nbytes for part in parts)
            share = whole * (ranks - 1) // ranks
            received += 2 * share if name == "all_reduce" else share
            return original(*arguments, **options)

        return patch.object(dist, name, counted)

    def train() -> None:
        head = CGEHead(channels, classes, epochs=1, stripes=stripes, pooling="average", shard_classes=True)
        optimizer = torch.optim.Adam(head.parameters(), fused=True)
        for _ in range(2):  # Adam's moments are there from the second on
            step(head, optimizer, feature_map, labels)

    with count("all_gather"), count("all_reduce"), count("reduce_scatter"):
        held = peak_bytes(Contender(train), torch.device("cpu"))
    (Path(folder) / str(rank)).write_text(f"{held} {received // 2}")
    dist.destroy_process_group()


def measured_rows(ranks: Sequence[int], sizes: tuple[int, int, int, int]) -> list[tuple[str, ...]]:
    """Rows of the measured table, of the rank that needs most."""
    found = []
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            processes.spawn(measure_rank, (count, sizes, folder), nprocs=count)
            pairs = [tuple(map(int, (Path(folder) / str(rank)).read_text().split())) for rank in range(count)]
        held, received = max(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
        wanted = need(sizes[0], count, *sizes[1:])
        most = wanted.state + wanted.features + wanted.scratch
        mega = (f"{size / 1e6:,.3f}" for size in (most, held, wanted.received, received))
        found.append((f"{sizes[0]:,}", str(count), *mega))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Memory and traffic of one rank for 1e5 to 1e8 identities on 1 to 1,024 GPUs, by formula; with "
        "--measure of gloo processes on this machine, beside the formulas. CGE_SCRATCH_MB sets the scratch budget.",
        exit_on_error=False,
    )
    parser.add_argument("--batch", type=PositiveInt, default=64, help="b, samples of one rank")
    parser.add_argument("--channels", type=PositiveInt, default=2048, help="C")
    parser.add_argument("--stripes", type=PositiveInt, default=3, help="n")
    parser.add_argument("--measure", type=PositiveInt, nargs="+", default=[], help="numbers of ranks to measure")
    parser.add_argument("--classes", type=PositiveInt, default=100_003, help="N that is measured")
    parser.add_argument("--markdown", action="store_true", help="table in Markdown")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.measure:
        if options.classes < max(options.measure) * max(1, options.batch):
            raise UserError(f"classes: must be at least ranks times batch, got {options.classes}")
        header = ("N", "ranks", "held MB, formula", "measured", "received MB, formula", "measured")
        sizes = options.classes, options.batch, options.channels, options.stripes
        print(table(header, measured_rows(options.measure, sizes), options.markdown))
        return
    header = (
        *("N", "GPUs", "state GiB", "features GiB", "scratch GiB", "held GiB"),
        *("received GiB a step", "TFLOP a step"),
    )
    print(table(header, rows(options.batch, options.channels, options.stripes), options.markdown))


if __name__ == "__main__":
    errors.run(main, PROGRAM)

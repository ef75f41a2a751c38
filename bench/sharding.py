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
"""

from collections.abc import Iterator
from math import ceil

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bench.results import Figure
from cge_kernels import scratch_bytes

CLASSES = [10**5, 10**6, 10**7, 10**8]
RANKS = [1, 8, 64, 1024]


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench sharding`."""
    parser.add_argument("--batch", type=PositiveInt, default=64, help="b, samples of one rank")
    parser.add_argument("--channels", type=PositiveInt, default=2048, help="C")
    parser.add_argument("--stripes", type=PositiveInt, default=3, help="n")


def measure(batch: int, channels: int, stripes: int) -> Iterator[Figure]:
    """What one rank needs, for each number of identities and of ranks."""
    for classes in CLASSES:
        for ranks in RANKS:
            place = "sharding", f"b {batch}, C {channels}, n {stripes}", f"N {classes:.0e}, {ranks:,} GPUs", "formula"
            for quantity, value in need(classes, ranks, batch, channels, stripes).items():
                yield Figure(*place, quantity, "FLOP" if quantity == "computed" else "B", value)


def need(classes: int, ranks: int, batch: int, channels: int, stripes: int) -> dict[str, int]:
    """Bytes, of which "held" are those at a time, and FLOPs of one rank; batch: b, of one rank."""
    rows, samples = ceil(classes / ranks), batch * ranks
    width = channels * (1 + stripes)
    statistics = 12 * (stripes + 1) + 12
    state, features = 4 * channels * rows * (4 + stripes), 8 * samples * width
    scratch = min(scratch_bytes(), 8 * (stripes + 1) * rows * samples)
    received = (ranks - 1) * batch * (8 * width + 4 * channels * stripes + 2 * statistics)
    flops = 2 * samples * rows * channels * (3 * stripes + 5)
    held = state + features + scratch
    return {
        "state": state, "features": features, "scratch": scratch, "held": held, "received": received, "computed": flops
    }  # fmt: skip

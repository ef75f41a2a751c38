"""Memory and time of the loss over the number of identities, with 3 stripes in float32.

revised_cross_entropy, forward and backward, measured as `operators` measures it. The floor is that of the products that
the mathematics needs (two forward for each number of classifier and memory, four backward for the classifier's and two
for the memory's), without scores that are computed again.
"""

from collections.abc import Iterator

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bench.cases import CONTENDERS, Case
from bench.measure import default_device, measure_ceilings
from bench.operators import compare
from bench.results import Figure
from bench.shapes import Shape
from cge_fast.progress import progress
from cge_kernels import scratch_bytes


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench loss`."""
    parser.add_argument("--classes", type=PositiveInt, nargs="+", default=[20_000, 200_000], help="N")
    parser.add_argument("--batch", type=PositiveInt, default=256, help="B")
    parser.add_argument("--channels", type=PositiveInt, default=512, help="C")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="which; default all")
    parser.add_argument("--rounds", type=PositiveInt, default=3, help="steps that count, of each contender")


def measure(classes: list[int], batch: int, channels: int, contenders: list[str], rounds: int) -> Iterator[Figure]:
    """Times, extra memory and floors at each size."""
    ceilings = measure_ceilings(default_device(), torch.float32)
    for n in progress(classes, what="timing", unit="sizes"):
        shape = Shape(batch=batch, channels=channels, height=3, width=1, classes=n)  # the map is of no use here
        setting = f"B {batch}, C {channels}, n {shape.stripes}, float32, scratch {scratch_bytes() >> 20} MiB"
        place = "loss", setting, f"N {n:,}"
        case = Case("revised_cross_entropy")
        yield from compare(place, case, shape, torch.float32, ceilings, contenders, rounds, seconds=float("inf"))

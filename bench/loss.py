"""Memory and time of the loss over the number of identities.

revised_cross_entropy, forward and backward, of this project and of cge_reference under torch.compile and eager, with 3
stripes in float32, each contender in a process of its own. Extra memory: the most bytes of tensors that a step holds
beyond its arguments, less those of its results (losses, correct and gradients). The share of the matmul peak counts the
FLOPs of the products that the mathematics needs (two forward for each number of classifier and memory, four backward
for the classifier's and two for the memory's), not those of scores that are computed again.
"""

from collections.abc import Iterator
from statistics import median

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from bench.cases import COMPILED, EAGER, OURS, Case, contenders
from bench.measure import apart, default_device, measure_ceilings, missing_compiler, peak_bytes, run
from bench.results import Figure
from bench.shapes import Shape
from bench.work import work
from cge_kernels import scratch_bytes

CASE = Case("revised_cross_entropy")
CONTENDERS = [OURS, EAGER, COMPILED]


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench loss`."""
    parser.add_argument("--classes", type=PositiveInt, nargs="+", default=[20_000, 200_000], help="N")
    parser.add_argument("--batch", type=PositiveInt, default=256, help="B")
    parser.add_argument("--channels", type=PositiveInt, default=512, help="C")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="which; default all")
    parser.add_argument("--rounds", type=PositiveInt, default=3, help="steps that count, of each contender")


def measure(classes: list[int], batch: int, channels: int, contenders: list[str], rounds: int) -> Iterator[Figure]:
    """Time, extra memory and share of the matmul peak of each contender at each size."""
    if missing_compiler():
        contenders = [name for name in contenders if name != COMPILED]
    for n, name in tqdm([(n, name) for n in classes for name in contenders], unit=" measurement"):
        shape = Shape(batch=batch, channels=channels, height=3, width=1, classes=n)  # the map is of no use here
        extra, samples, matmul = apart(measure_here, name, shape, rounds)
        setting = f"B {batch}, C {channels}, n {shape.stripes}, float32, scratch {scratch_bytes() >> 20} MiB"
        place = "loss", setting, f"N {n:,}", name
        yield Figure.median(*place, "step", "s", samples=samples)
        yield Figure(*place, "extra memory", "B", extra)
        rate = work(CASE.operator, shape)["step"].flops / median(samples)
        yield Figure(*place, "of the matmul peak", "%", 1e2 * rate / matmul)


def measure_here(name: str, shape: Shape, rounds: int) -> tuple[int, list[float], float]:
    """Extra bytes, seconds of the steps, and FLOP/s of a large matmul; torch.compile compiles in a step before."""
    device = default_device()
    compared = contenders(CASE, shape, torch.float32, device, with_compiled=name == COMPILED)[name]
    run(compared, device)
    seconds = [run(compared, device)["step"] for _ in range(rounds)]
    extra = peak_bytes(compared, device) - result_bytes(shape)
    return extra, seconds, measure_ceilings(device, torch.float32, rounds).flops


def result_bytes(shape: Shape) -> int:
    """Losses, correct, and the gradients of features, classifier and local features; and the losses' gradient."""
    gradients = shape.batch * shape.channels * (1 + shape.stripes) + shape.classes * shape.channels
    return 4 * gradients + shape.batch * (2 * 4 + 1 + shape.stripes)

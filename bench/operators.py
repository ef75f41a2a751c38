"""Time and memory of every operator and of the head: this project, cge_reference eager and under torch.compile.

Contenders take turns in one run. Floor: what must be moved or multiplied, whichever takes longer, at the rates of a
large copy and a large matmul of the same run; powers, divisions and exponentials are not in it, nor what is computed
again. Extra memory: the most bytes of tensors that a step holds at a time beyond its arguments, results and gradients.
The head's step ends with the write of its memory.
"""

import sys
from collections.abc import Iterator

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt

from bench.cases import CASES, CONTENDERS, Case, contenders
from bench.measure import default_device, extra_bytes, measure_ceilings, take_turns
from bench.results import Figure
from bench.shapes import DEFAULT, DTYPES, SHAPES, Shape
from bench.work import work
from cge_fast.compiled import missing_compiler
from cge_fast.progress import progress


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench operators`."""
    operators = sorted({case.operator for case in CASES})
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT, help="default all but tiny")
    parser.add_argument("--operators", nargs="+", choices=operators, default=operators, help="which; default all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of feature map and memory")
    parser.add_argument("--rounds", type=PositiveInt, default=15, help="turns of each contender, at most")
    parser.add_argument("--seconds", type=PositiveFloat, default=20.0, help="for each operator and shape, about")


def measure(shapes: list[str], operators: list[str], dtype: str, rounds: int, seconds: float) -> Iterator[Figure]:
    """Times by direction and extra memory of each case at each shape, floors, and the rates that these follow from."""
    ceilings = measure_ceilings(default_device(), DTYPES[dtype])
    for name, rate, unit in zip(("copy", "matmul"), ceilings, ("B/s", "FLOP/s"), strict=True):
        yield Figure("rates", dtype, "device", name, "rate", unit, rate)
    places = [(name, case) for name in shapes for case in CASES if case.operator in operators]
    for name, case in progress(places, what="timing", unit="cases"):
        place = "operators", f"{name}, {dtype}", str(case)
        yield from compare(place, case, SHAPES[name], DTYPES[dtype], ceilings, CONTENDERS, rounds, seconds)


def compare(
    place: tuple[str, str, str], case: Case, shape: Shape, dtype: torch.dtype, ceilings: tuple[float, float],
    names: list[str], rounds: int, seconds: float,
) -> Iterator[Figure]:  # fmt: skip
    """Of the named contenders in turns, in a table for each quantity; place: bench, setting and subject."""
    if missing_compiler():
        print(f"torch.compile is left out, it cannot run here: {missing_compiler()}", file=sys.stderr)
    (bench, *rest), device = place, default_device()
    compared = contenders(case, shape, dtype, device, with_compiled=not missing_compiler())
    compared = {name: contender for name, contender in compared.items() if name in names}
    for name, laps in take_turns(compared, rounds, seconds).items():
        for direction, samples in laps.items():
            yield Figure.median(f"{bench}, {direction}", *rest, name, direction, "s", samples=samples)
        extra = extra_bytes(compared[name])
        yield Figure(f"{bench}, extra memory", *rest, name, "extra memory", "B", extra)
    for direction, least in floors(case, shape, dtype, *ceilings).items():
        yield Figure(f"{bench}, {direction}", *rest, "floor", direction, "s", least)


def floors(case: Case, shape: Shape, dtype: torch.dtype, bandwidth: float, flops: float) -> dict[str, float]:
    """The least seconds of each direction at these rates, if moving and computing overlap."""
    needed = work(case.operator, shape, case.pooling or "average", dtype.itemsize)
    return {direction: max(least.bytes / bandwidth, least.flops / flops) for direction, least in needed.items()}

"""Time and memory of every operator and of the head: this project, cge_reference eager and under torch.compile.

Contenders take turns in one run. Floor: what must be moved or multiplied, whichever takes longer, at the rates of a
large copy and a large matmul of the same run; powers, divisions and exponentials are not in it. Peak: the most bytes of
tensors that a step holds at a time beyond its arguments.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from bench import pictures as draw
from bench.cases import CASES, Case, contenders
from bench.measure import (
    Ceilings,
    Contender,
    default_device,
    measure_ceilings,
    missing_compiler,
    peak_bytes,
    take_turns,
)
from bench.results import Figure
from bench.shapes import DEFAULT, DTYPES, SHAPES, Shape
from bench.work import work

FLOOR = "floor"
SCALED = Case("head", "average")
# A small map, so that the classes are what costs; and the paper's map.
SWEEPS = {
    "N": ("classes", Shape(channels=512, height=8, width=4), (1_000, 4_000, 16_000, 64_000)),
    "B": ("batch", Shape(), (16, 32, 64, 128)),
}


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench operators`."""
    operators = sorted({case.operator for case in CASES})
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT, help="default all but tiny")
    parser.add_argument("--operators", nargs="+", choices=operators, default=operators, help="which; default all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of feature map and memory")
    parser.add_argument("--rounds", type=PositiveInt, default=15, help="turns of each contender, at most")
    parser.add_argument("--seconds", type=PositiveFloat, default=20.0, help="for each operator and shape, about")
    parser.add_argument("--pictures", type=Path, help="folder for roofline.png and, of more sizes, scaling.png")


def measure(
    shapes: list[str], operators: list[str], dtype: str, rounds: int, seconds: float, pictures: Path | None
) -> Iterator[Figure]:
    """Times by direction and peak memory of each case at each shape, floors, and the rates that these follow from."""
    kind, device = DTYPES[dtype], default_device()
    if missing_compiler():
        print(f"torch.compile is left out, it cannot run here: {missing_compiler()}", file=sys.stderr)
    ceilings = measure_ceilings(device, kind)
    yield Figure("rates", dtype, "copy", "device", "read and written", "B/s", ceilings.bandwidth)
    yield Figure("rates", dtype, "matmul", "device", "computed", "FLOP/s", ceilings.flops)
    first: list[Figure] = []  # of the first shape
    places = [(name, case) for name in shapes for case in CASES if case.operator in operators]
    for name, case in tqdm(places, unit=" case"):
        place = "operators", f"{name}, {dtype}", str(case)
        compared = contenders(case, SHAPES[name], kind, device, not missing_compiler())
        found = [*timed(place, compared, device, rounds, seconds), *floors(place, case, SHAPES[name], kind, ceilings)]
        first += found if name == shapes[0] else []
        yield from found
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
        draw.roofline(first, SHAPES[shapes[0]], kind, ceilings, pictures / "roofline.png")
        swept = []
        for figure in sweep(kind, device, rounds, seconds):
            swept.append(figure)
            yield figure
        draw.scaling(swept, pictures / "scaling.png")


def timed(
    place: tuple[str, str, str], compared: dict[str, Contender], device: torch.device, rounds: int, seconds: float
) -> Iterator[Figure]:
    """Times by direction, and peaks, of contenders that take turns; place: bench, setting and subject."""
    for name, laps in take_turns(compared, device, rounds, seconds).items():
        for direction, samples in laps.items():
            yield Figure.median(*place, name, direction, "s", samples=samples)
        yield Figure(*place, name, "peak", "B", peak_bytes(compared[name], device))


def floors(
    place: tuple[str, str, str], case: Case, shape: Shape, dtype: torch.dtype, ceilings: Ceilings
) -> Iterator[Figure]:
    """The least time of each direction at the rates that were measured."""
    for direction, least in work(case.operator, shape, case.pooling or "average", dtype.itemsize).items():
        yield Figure(*place, FLOOR, direction, "s", ceilings.seconds(least.bytes, least.flops))


def sweep(dtype: torch.dtype, device: torch.device, rounds: int, seconds: float) -> Iterator[Figure]:
    """The project's and the eager reference's step, time and peak, over identities and over the batch."""
    for name, (field, shape, sizes) in SWEEPS.items():
        for size in tqdm(sizes, desc=name, unit=" size", leave=False):
            compared = contenders(SCALED, replace(shape, **{field: size}), dtype, device, with_compiled=False)
            for figure in timed(("scaling", name, f"{size:,}"), compared, device, rounds, seconds):
                if figure.quantity in ("step", "peak"):
                    yield figure

"""How time and memory of the head's step grow with the identities and with the batch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench.cases import Case, contenders
from bench.measure import Times, peak_bytes, take_turns
from bench.shapes import Shape

CASE = Case("head", "average")
# A small map, so that the classes are what costs; and the paper's map.
SWEEPS = {
    "N": ("classes", Shape(channels=512, height=8, width=4), (1_000, 4_000, 16_000, 64_000)),
    "B": ("batch", Shape(), (16, 32, 64, 128)),
}


@dataclass(frozen=True)
class Point:
    """One measurement: the step's times, and the most bytes that it holds beyond its arguments."""

    sweep: str
    size: int
    contender: str
    times: Times
    peak_bytes: int


def sweep(name: str, dtype: torch.dtype, device: torch.device, rounds: int, seconds: float) -> Iterator[Point]:
    """The project's and the eager reference's step at each size of a sweep, as they are measured."""
    field, shape, sizes = SWEEPS[name]
    for size in sizes:
        compared = contenders(CASE, replace(shape, **{field: size}), dtype, device, with_compiled=False)
        for contender, times in take_turns(compared, device, rounds, seconds).items():
            yield Point(name, size, contender, times["step"], peak_bytes(compared[contender], device))


def slopes(points: list[Point]) -> tuple[float, float]:
    """With which powers of the size the points' time and memory grow, each fitted over all of them."""
    sizes = [point.size for point in points]
    return (
        fitted_slope(sizes, [point.times.median for point in points]),
        fitted_slope(sizes, [point.peak_bytes for point in points]),
    )


def fitted_slope(sizes: list[int], values: list[float]) -> float:
    """The exponent a of the line values = b * sizes^a that fits best on a doubly logarithmic scale."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x @ x)).item()

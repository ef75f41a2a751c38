"""CMC/mAP speed and peak memory against a plain NumPy evaluator, Market-1501 and MSMT17 sizes: python -m bench.evaluate

Both rank the same random features by the cosine, in turns, each run in a process of its own. Seconds are those of the
evaluation alone; memory is the process's largest resident memory less what it was with the features drawn.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor

from bench.numpy_ranking import numpy_ranking
from bench.tables import table
from cge_fast import errors
from cge_fast.evaluation.ranking import evaluate_ranking

PROGRAM = "bench.evaluate"


@dataclass(frozen=True)
class Size:
    """How many images are compared, of how many identities from how many cameras, and the features' channels."""

    queries: int
    gallery: int
    identities: int
    cameras: int
    channels: int = 2048


@dataclass(frozen=True)
class Run:
    """One evaluation: seconds, peak bytes above the features, and the mAP that came out."""

    seconds: float
    memory: int
    mAP: float  # noqa: N815 - as in Retrieval


SIZES = {
    "market1501": Size(queries=3_368, gallery=19_281, identities=750, cameras=6),
    "msmt17": Size(queries=11_659, gallery=82_161, identities=3_060, cameras=15),
}


def draw(size: Size) -> list[Tensor]:
    """Features (Q, C) float32, identities (Q,) and cameras (Q,) of the queries, then those of the gallery."""
    random = torch.Generator().manual_seed(0)
    drawn = []
    for count in (size.queries, size.gallery):
        drawn += [
            torch.randn(count, size.channels, generator=random),
            torch.randint(size.identities, (count,), generator=random),
            torch.randint(size.cameras, (count,), generator=random),
        ]
    return drawn


def with_numpy(*drawn: Tensor) -> float:
    """mAP by the plain NumPy evaluator."""
    return numpy_ranking(*(tensor.numpy() for tensor in drawn), progress=True)[0]


def with_cge_fast(*drawn: Tensor) -> float:
    """mAP by cge_fast's evaluator."""
    return evaluate_ranking(*drawn, progress=True).mAP


EVALUATORS = {"NumPy": with_numpy, "cge_fast": with_cge_fast}


def peak_memory() -> int:
    """The largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(evaluate: Callable[..., float], size: Size) -> Run:
    """Draws features of the size and evaluates them once, in this process."""
    drawn = draw(size)
    before, start = peak_memory(), time.perf_counter()
    mean_average_precision = evaluate(*drawn)
    return Run(time.perf_counter() - start, peak_memory() - before, mean_average_precision)


def run_apart(evaluate: Callable[..., float], size: Size) -> Run:
    """`run` in a new process, whose peak memory is that of this run alone."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(run, evaluate, size).result()


def measure(size: Size, repeats: int) -> dict[str, Run]:
    """The median seconds and memory of each evaluator, which take turns."""
    runs = {name: [] for name in EVALUATORS}
    for _ in range(repeats):
        for name, evaluate in EVALUATORS.items():
            runs[name].append(run_apart(evaluate, size))
    return {
        name: Run(median(one.seconds for one in found), median(one.memory for one in found), found[0].mAP)
        for name, found in runs.items()
    }


def rows(name: str, size: Size, runs: dict[str, Run]) -> list[tuple[str, ...]]:
    """The rows of a size in the table."""
    return [
        (
            f"{name}: {size.queries:,} x {size.gallery:,}",
            evaluator,
            f"{found.seconds:7.1f}",
            f"{found.memory / 2**30:23.2f}",
            f"{found.mAP:.4%}",
            f"{runs['NumPy'].seconds / found.seconds:.2f}x",
        )
        for evaluator, found in runs.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Times the evaluator and takes its peak memory, beside a plain NumPy evaluator's, on random "
        "features of 2,048 channels.",
        exit_on_error=False,
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="data sets' sizes")
    parser.add_argument("--repeats", type=PositiveInt, default=1, help="runs of each, in turns; medians are printed")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    found = []
    for name in options.sizes:
        found += rows(name, SIZES[name], measure(SIZES[name], options.repeats))
    print(table(("size", "evaluator", "seconds", "GiB above the features", "mAP", "speed"), found))


if __name__ == "__main__":
    errors.run(main, PROGRAM)

"""Speed and peak memory of the evaluator beside one in plain NumPy, at the sizes of Market-1501 and MSMT17.

Both rank the same random features by the cosine, in turns, each run in a process of its own. Seconds are those of the
evaluation alone; memory is the process's largest resident memory less what it was with the features drawn.
"""

import resource
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from numpy.typing import NDArray
from torch import Tensor

from bench.measure import apart, take_turns
from bench.results import Figure
from cge_fast.evaluation.ranking import evaluate_ranking


class Size(NamedTuple):
    """How many images are compared, of how many identities from how many cameras, and the features' channels."""

    queries: int
    gallery: int
    identities: int
    cameras: int
    channels: int = 2048


SIZES = {
    "market1501": Size(queries=3_368, gallery=19_281, identities=750, cameras=6),
    "msmt17": Size(queries=11_659, gallery=82_161, identities=3_060, cameras=15),
}


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench evaluate`."""
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="data sets' sizes")
    parser.add_argument("--repeats", type=PositiveInt, default=1, help="runs of each, in turns")


def measure(sizes: list[str], repeats: int) -> Iterator[Figure]:
    """Time, memory and mAP of each evaluator at each size."""
    for name in sizes:
        size = SIZES[name]
        runs = {evaluator: partial(apart, run, evaluator, size) for evaluator in ("cge_fast", "NumPy")}
        for evaluator, found in take_turns(runs, repeats, warmup=0).items():
            place = "evaluate", f"C {size.channels}", f"{name}: {size.queries:,} x {size.gallery:,}", evaluator
            yield Figure.median(*place, "time", "s", samples=found["time"])
            yield Figure(*place, "above the features", "B", median(found["memory"]))
            yield Figure(*place, "mAP", "%", 1e2 * found["mAP"][0])


def run(evaluator: str, size: Size) -> dict[str, float]:
    """Draws features of the size and evaluates them once: seconds, peak bytes above the features, and the mAP."""
    drawn = draw(size)
    before, start = peak_memory(), time.perf_counter()
    if evaluator == "NumPy":
        mean_average_precision, _ = numpy_ranking(*(tensor.numpy() for tensor in drawn))
    else:
        mean_average_precision = evaluate_ranking(*drawn, progress=True).mAP
    seconds = time.perf_counter() - start
    return {"time": seconds, "memory": peak_memory() - before, "mAP": mean_average_precision}


def draw(size: Size) -> list[Tensor]:
    """Features (Q, C) float32, identities (Q,) and cameras (Q,) of the queries, then those of the gallery."""
    random = torch.Generator().manual_seed(0)
    drawn = []
    for count in (size.queries, size.gallery):
        drawn.append(torch.randn(count, size.channels, generator=random))
        drawn += [torch.randint(most, (count,), generator=random) for most in (size.identities, size.cameras)]
    return drawn


def peak_memory() -> int:
    """The largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def numpy_ranking(
    query_features: NDArray,
    query_identities: NDArray,
    query_cameras: NDArray,
    gallery_features: NDArray,
    gallery_identities: NDArray,
    gallery_cameras: NDArray,
    ranks: int = 50,
) -> tuple[float, list[float]]:
    """mAP and the cumulative matching curve by the cosine, as `evaluate_ranking` defines them, query by query.

    Arguments as there, as arrays. Beside the features it holds their normalised copies, (Q + G) C numbers, and the
    distances, Q G numbers. At least one query must have a match.
    """
    query = query_features / np.linalg.norm(query_features, axis=1, keepdims=True)
    gallery = gallery_features / np.linalg.norm(gallery_features, axis=1, keepdims=True)
    distances = query @ gallery.T
    np.negative(distances, out=distances)
    average_precisions, first_places = [], []
    for row, identity, camera in zip(distances, query_identities, query_cameras, strict=True):
        order = np.argsort(row, kind="stable")
        same_identity = gallery_identities[order] == identity
        junk = same_identity & (gallery_cameras[order] == camera)
        places = np.flatnonzero(same_identity[~junk]) + 1
        if len(places):
            average_precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
            first_places.append(places[0])
    curve = [float(np.mean(np.array(first_places) <= rank)) for rank in range(1, ranks + 1)]
    return float(np.mean(average_precisions)), curve

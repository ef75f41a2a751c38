"""What the host takes for a step of each operator and of the head, beside eager PyTorch, and where it goes.

Both take turns at a tiny shape, so that next to nothing is computed. On a GPU the host does not wait for it. Without
one the project's kernels, compiled for an H100, go through Triton's own launcher to a driver that does nothing
(null_driver.py), while eager PyTorch computes on the CPU what little there is. Products are TF32: the launches are
those of a training with tensor cores.
"""

import cProfile
import pstats
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bench.cases import CASES, OURS, contenders
from bench.measure import default_device, host_seconds, take_turns
from bench.null_driver import null_driver
from bench.results import Figure
from bench.shapes import SHAPES
from cge_fast.progress import progress

PROFILED = 300  # steps
# Where a function of the profile is from, by a part of its file's path; the first that fits. Else it is PyTorch's C++.
PLACES = {
    "cge_kernels": "/cge_kernels/",
    "cge_fast": "/cge_fast/",
    "Triton's launcher": "triton",
    "PyTorch's Python": "/torch/",
    "bench": "/bench/",
}


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench host`."""
    parser.add_argument("--rounds", type=PositiveInt, default=200, help="turns of each contender")


def measure(rounds: int) -> Iterator[Figure]:
    """Host time of a step of each operator and of the head, and the parts of the latter."""
    device = default_device()
    without_gpu = device.type == "cpu"
    if without_gpu:
        print("There is no GPU: kernels are launched to a driver that does nothing.\n")
    setting = "tiny, TF32, null driver" if without_gpu else "tiny, TF32"
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with null_driver() if without_gpu else nullcontext():
            for case in progress(CASES, what="timing", unit="cases"):
                compared = contenders(case, SHAPES["tiny"], torch.float32, device, with_compiled=False)
                runs = {name: partial(host_seconds, contender.step, device) for name, contender in compared.items()}
                for name, laps in take_turns(runs, rounds, warmup=20).items():
                    yield Figure.median("host", setting, str(case), name, "step", "s", samples=laps["host"])
            for place, share in shares(compared[OURS].step).items():  # the last case is the head with GeM
                yield Figure("where the host's time goes", setting, str(case), OURS, place, "", share)
    finally:
        torch.set_float32_matmul_precision(precision)


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Each place's share of the time under Python's profiler, which makes Python look slower than it is beside C++."""
    with cProfile.Profile() as profile:
        for _ in range(PROFILED):
            step()
    totals = dict.fromkeys([*PLACES, "PyTorch's C++"], 0.0)
    for (file, _, name), (_, _, seconds, _, _) in pstats.Stats(profile).stats.items():
        where = f"{file} {name}"
        place = next((place for place, part in PLACES.items() if part in where), "PyTorch's C++")
        totals[place] += seconds
    whole = sum(totals.values())
    return {place: seconds / whole for place, seconds in totals.items()}

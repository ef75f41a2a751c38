"""What the host takes to launch an operator's kernels, and those of a step of the head, beside eager PyTorch.

Both take turns at a tiny shape, so that next to nothing is computed. On a GPU the host does not wait for it. Without
one kernels are not run: the project's launches go to a hook, so that Triton's launcher, some microseconds a launch, is
not in the times, while eager PyTorch computes on the CPU what little there is.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

import cge_kernels
from bench.cases import CASES, EAGER, OURS, contenders
from bench.measure import WARMUP, Contender, default_device
from bench.results import Figure
from bench.shapes import SHAPES


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench host`."""
    parser.add_argument("--rounds", type=PositiveInt, default=50, help="turns of each contender")


def measure(rounds: int) -> Iterator[Figure]:
    """Host time of a step of each operator and of the head."""
    device = default_device()
    setting = "tiny, float32, kernels not run" if device.type == "cpu" else "tiny, float32"
    with ExitStack() as stack:
        if device.type == "cpu":
            print("There is no GPU: kernels are not run, and Triton's launcher is not in the times.\n")
            stack.enter_context(cge_kernels.backend("triton"))
            stack.enter_context(cge_kernels.launching(lambda launch: None))
        for case in tqdm(CASES, unit=" case"):
            compared = contenders(case, SHAPES["tiny"], torch.float32, device, with_compiled=False)
            samples: dict[str, list[float]] = {OURS: [], EAGER: []}
            for number in range(-WARMUP, rounds):
                for name in (OURS, EAGER) if number % 2 else (EAGER, OURS):
                    seconds = host_seconds(compared[name], device)
                    samples[name] += [seconds] if number >= 0 else []
            for name, found in samples.items():
                yield Figure.median("host", setting, str(case), name, "step", "s", samples=found)


def host_seconds(contender: Contender, device: torch.device) -> float:
    """Until a step's calls have returned, on a GPU that had nothing to do before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = contender.forward()
    if contender.backward:
        contender.backward(result)
    return time.perf_counter() - start

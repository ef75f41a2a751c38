"""Times of what takes turns, the peak of its memory, and what the device reaches at most."""

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing import get_context
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from cge_kernels.common import recycle

CPU = torch.device("cpu")
WARMUP = 2  # rounds that do not count; in the first one torch.compile compiles
FEWEST_ROUNDS = 5
COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes, far more than the caches hold
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
FLUSHED = 256 << 20  # bytes written between runs on a GPU, more than any L2 cache holds

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr whenever it starts and stops


class Instant:
    """A moment on the device's own clock; the difference of two is in seconds."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        self.time = time.perf_counter()

    def __sub__(self, earlier: "Instant") -> float:
        if self.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@dataclass(frozen=True)
class Contender:
    """One of those compared: `backward` takes what `forward()` returns and gives gradients; without it there is one
    direction."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None
    device: torch.device = CPU

    def step(self) -> tuple[Any, Any]:
        """Both directions: result and gradients."""
        result = self.forward()
        return result, self.backward(result) if self.backward else None

    def __call__(self) -> dict[str, float]:
        """Seconds of one run, "forward", "backward" and both as "step". A GPU's L2 cache is flushed before it."""
        if self.device.type == "cuda":
            torch.empty(FLUSHED, dtype=torch.uint8, device=self.device).zero_()
        start = Instant(self.device)
        result = self.forward()
        between = Instant(self.device)
        if self.backward is None:
            return {"forward": between - start, "step": between - start}
        self.backward(result)
        end = Instant(self.device)
        return {"forward": between - start, "backward": end - between, "step": end - start}


def host_seconds(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds until a step's calls have returned, as "host", on a GPU that had nothing to do before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    return {"host": time.perf_counter() - start}


def take_turns(
    runs: Mapping[str, Callable[[], dict[str, float]]], rounds: int, seconds: float = math.inf, warmup: int = WARMUP
) -> dict[str, dict[str, list[float]]]:
    """What each run (a contender, say) returns, by its name and the returned names, one value a round.

    Every round another run is the first, so that whatever else the machine does falls on all of them. The first
    `warmup` rounds do not count. After `seconds` the rounds end early, but not before there are 5.
    """
    names = list(runs)
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    start = time.perf_counter()
    for number in range(-warmup, rounds):
        if number == 0:
            start = time.perf_counter()
        if number >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            values = runs[name]()
            for part, value in values.items() if number >= 0 else ():
                found[name][part].append(value)
    return found


def extra_bytes(contender: Contender) -> int:
    """The most bytes of tensors that one run holds at a time, less what was there before, results and gradients."""
    recycle.release()
    if contender.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(contender.device)
        before = torch.cuda.memory_allocated(contender.device)
        kept = contender.step()
        held = torch.cuda.max_memory_allocated(contender.device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = contender.step()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [0, *(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))]
        held = max(accumulate(changes))
    return held - sum(leaf.nbytes for leaf in tree_leaves(kept) if isinstance(leaf, Tensor))


def measure_ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 15) -> tuple[float, float]:
    """Bytes per second, read and written, of a large copy, and FLOP/s of a large matmul: medians, in turns."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, SIDE[device.type], SIDE[device.type], device=device).to(dtype)
    done = {"copy": 2 * source.nbytes, "matmul": 2 * len(left) ** 3}
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}
    found = take_turns({name: Contender(function, device=device) for name, function in runs.items()}, rounds)
    bandwidth, flops = (done[name] / median(laps["step"]) for name, laps in found.items())
    return bandwidth, flops


def apart(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """A function's result in a new process, whose memory and environment variables are its own."""
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

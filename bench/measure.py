"""Times of contenders that take turns, the peak of their memory, and what the device reaches at most."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from cge_kernels.common import recycle

WARMUP = 2  # rounds that do not count; in the first one torch.compile compiles
FEWEST_ROUNDS = 5
COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes, far more than the caches hold
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
FLUSHED = 256 << 20  # bytes written between runs on a GPU, more than any L2 cache holds

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr whenever it starts and stops


@dataclass(frozen=True)
class Contender:
    """One of those compared: `forward()` returns what `backward` takes; without backward there is one direction."""

    forward: Callable[[], Any]
    backward: Callable[[Any], None] | None = None


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


def take_turns(
    contenders: dict[str, Contender], device: torch.device, rounds: int = 15, seconds: float = 20.0
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round by contender and direction ("forward", "backward", and both as "step").

    One run of each is a round; every round another one is the first. After `seconds` the rounds end early, but not
    before there are 5. On a GPU the L2 cache is flushed before each run.
    """
    names = list(contenders)
    found = {name: defaultdict(list) for name in names}
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    start = time.perf_counter()
    for number in range(-WARMUP, rounds):
        if number == 0:
            start = time.perf_counter()
        if number >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if flushed is not None:
                flushed.zero_()
            laps = run(contenders[name], device)
            if number >= 0:
                for direction, duration in laps.items():
                    found[name][direction].append(duration)
    return found


def run(contender: Contender, device: torch.device) -> dict[str, float]:
    """Seconds of one run by direction."""
    start = Instant(device)
    result = contender.forward()
    between = Instant(device)
    if contender.backward is None:
        return {"forward": between - start}
    contender.backward(result)
    end = Instant(device)
    return {"forward": between - start, "backward": end - between, "step": end - start}


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """The most bytes of tensors that one run holds at a time beyond what was there before."""

    def step() -> None:
        result = contender.forward()
        if contender.backward is not None:
            contender.backward(result)

    recycle.release()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([0, *(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))])
    return int(held.cumsum(0).max())


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second, read and written, and FLOPs per second."""

    bandwidth: float
    flops: float

    def seconds(self, moved: int, flops: int) -> float:
        """The least time for so many bytes and FLOPs, if moving and computing overlap."""
        return max(moved / self.bandwidth, flops / self.flops)


def measure_ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 15) -> Ceilings:
    """Medians of `rounds` copies and matmuls that take turns."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, SIDE[device.type], SIDE[device.type], device=device).to(dtype)
    contenders = {"copy": Contender(lambda: target.copy_(source)), "matmul": Contender(lambda: left @ right)}
    found = {name: median(laps["forward"]) for name, laps in take_turns(contenders, device, rounds).items()}
    return Ceilings(2 * source.nbytes / found["copy"], 2 * len(left) ** 3 / found["matmul"])


def apart(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """A function's result in a new process, whose memory and environment variables are its own."""
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@cache
def missing_compiler() -> str:
    """Why torch.compile cannot run here, on one line; "" if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except (torch._inductor.exc.InductorError, torch._dynamo.exc.BackendCompilerFailed) as error:
        return str(error).splitlines()[0]
    return ""


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

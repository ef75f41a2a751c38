"""Times of contenders that take turns, and the peak of their memory."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cge_kernels.common import recycle

WARMUP = 2  # rounds that do not count; in the first one torch.compile compiles
FEWEST_ROUNDS = 5
FLUSHED = 256 << 20  # bytes written between runs on a GPU, more than any L2 cache holds
UNCERTAIN = 0.2  # spread from which on a figure is marked


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr whenever it starts and stops


def directions(has_backward: bool) -> tuple[str, ...]:
    """What is timed of an operator."""
    return ("forward", "backward", "step") if has_backward else ("forward",)


@dataclass(frozen=True)
class Contender:
    """One of those compared: `forward()` returns what `backward` takes; without backward there is one direction."""

    forward: Callable[[], Any]
    backward: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Times:
    """Durations of one direction of one contender, in seconds; (rounds,)."""

    seconds: Tensor

    @property
    def median(self) -> float:
        """Seconds."""
        return self.seconds.quantile(0.5).item()

    @property
    def percentiles(self) -> tuple[float, float]:
        """20% and 80% of the rounds took less, seconds."""
        low, high = self.seconds.quantile(torch.tensor([0.2, 0.8], dtype=self.seconds.dtype)).tolist()
        return low, high

    @property
    def spread(self) -> float:
        """(80% - 20%) / median."""
        low, high = self.percentiles
        return (high - low) / self.median

    @property
    def mark(self) -> str:
        """ "~" behind a figure that the rounds disagree on by more than a fifth."""
        return "~" if self.spread > UNCERTAIN else ""


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
) -> dict[str, dict[str, Times]]:
    """Times by contender and direction ("forward", "backward", and both as "step").

    One run of each is a round; every round another one is the first. After `seconds` the rounds end early, but not
    before there are 5. On a GPU the L2 cache is flushed before each run.
    """
    names = list(contenders)
    found = {name: {direction: [] for direction in directions(contenders[name].backward is not None)} for name in names}
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
    return {
        name: {direction: Times(torch.tensor(values)) for direction, values in laps.items()}
        for name, laps in found.items()
    }


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

"""Where the time of a training step goes: a table, and a trace for chrome://tracing or Perfetto."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

TRACE = "trace.json"
STEPS = 40  # that are recorded at most
BACKBONE = ("backbone forward", "backbone backward")
_FORWARD, _GRADIENT = "forward of the backbone", "gradient of the feature map"

_profiled: "StepProfile | None" = None  # the one that records now


@contextmanager
def part(name: str) -> Iterator[None]:
    """Names a part of a training step for the profile, if one is taken."""
    if _profiled is None:
        yield
        return
    with record_function(name):
        yield
        _profiled.synchronize()


class StepProfile:
    """Records steps of the first epoch with torch.profiler.

    Every part waits for the GPU, so a profiled run is slower than another; the shares are what counts.

    Args:
        backbone: it is told apart from the head by hooks, in forward and backward.
        device: where the steps run.
    """

    def __init__(self, backbone: nn.Module, device: torch.device):
        self.device, self.begun, self.recorded = device, 0, False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profiler = profile(activities=activities)
        self._forward: record_function | None = None
        backbone.register_forward_pre_hook(self._forward_begins)
        backbone.register_forward_hook(self._forward_ends)

    def step(self) -> None:
        """A step begins: recording begins with the second, since the first one waits for all that is lazy."""
        global _profiled
        self.begun += 1
        if self.begun == 2 and not self.recorded:
            _profiled = self
            self.profiler.start()
        elif self.begun == 2 + STEPS:
            self.stop()

    def stop(self) -> None:
        """Records no more."""
        global _profiled
        if _profiled is self:
            _profiled = None
            self.profiler.stop()
            self.recorded = True

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forward_begins(self, backbone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if _profiled is self and backbone.training:
            self._forward = record_function(_FORWARD)
            self._forward.__enter__()

    def _forward_ends(self, backbone: nn.Module, inputs: tuple[Tensor, ...], feature_map: Tensor) -> None:
        if self._forward is not None:
            self.synchronize()
            self._forward.__exit__(None, None, None)
            self._forward = None
            feature_map.register_hook(self._gradient_arrives)

    def _gradient_arrives(self, gradient: Tensor) -> None:
        self.synchronize()
        with record_function(_GRADIENT):
            pass

    def seconds(self) -> dict[str, float]:
        """Seconds in each part of the recorded steps."""
        starts: dict[str, list[float]] = defaultdict(list)
        spent: dict[str, float] = defaultdict(float)
        for event in sorted(self.profiler.events(), key=lambda event: event.time_range.start):
            if event.device_type == torch.autograd.DeviceType.CPU:
                starts[event.name].append(event.time_range.start)
                spent[event.name] += event.time_range.elapsed_us() * 1e-6
        head_backward = 1e-6 * (sum(starts[_GRADIENT]) - sum(starts["backward"]))
        return {
            "waiting for data": spent["waiting for data"],
            "augmentation": spent["augmentation"],
            "backbone forward": spent[_FORWARD],
            "head forward and losses": spent["forward"] - spent[_FORWARD],
            "head backward": head_backward,
            "backbone backward": spent["backward"] - head_backward,
            "optimizer": spent["optimizer"],
            "memory write": spent["memory write"],
            "bookkeeping": spent["bookkeeping"],
        }

    def report(self, folder: Path) -> str:
        """Writes the trace into a folder; seconds and shares by part, and the share of all that is not the backbone."""
        if not self.recorded:
            return "no training step to profile"
        self.profiler.export_chrome_trace(str(folder / TRACE))
        seconds = self.seconds()
        total = sum(seconds.values())
        rows = [f"{name:<28}{spent:9.2f} s {spent / total:6.1%}" for name, spent in seconds.items()]
        rest = sum(spent for name, spent in seconds.items() if name not in BACKBONE)
        return "\n".join([*rows, f"{'all but the backbone':<28}{rest:9.2f} s {rest / total:6.1%}"])

"""Where the time of a training step goes."""

import time
from collections import defaultdict

import torch
from torch import Tensor, nn

BACKBONE = ("backbone forward", "backbone backward")


class Stopwatch:
    """Adds up the time between laps, by the name of the part that each lap ends.

    Every lap waits for the GPU, so a profiled run is slower than another; the shares are what counts.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def start(self) -> None:
        """Forgets the time since the last lap."""
        self._wait()
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Counts the time since the last lap, or start, to `part`."""
        before = self.last
        self.start()
        self.seconds[part] += self.last - before

    def watch(self, backbone: nn.Module) -> None:
        """Laps by itself, in training, where the backbone's forward ends and where its backward begins."""

        def forward_ended(module: nn.Module, inputs: tuple[Tensor, ...], feature_map: Tensor) -> None:
            if module.training:
                self.lap("backbone forward")
                feature_map.register_hook(lambda gradient: self.lap("head backward"))

        backbone.register_forward_hook(forward_ended)

    def table(self) -> str:
        """Seconds and shares by part, and the share of all that is not the backbone."""
        total = sum(self.seconds.values())
        if not total:
            return "no training step to profile"
        rows = [f"{part:<28}{seconds:9.2f} s {seconds / total:6.1%}" for part, seconds in self.seconds.items()]
        rest = sum(seconds for part, seconds in self.seconds.items() if part not in BACKBONE)
        return "\n".join([*rows, f"{'all but the backbone':<28}{rest:9.2f} s {rest / total:6.1%}"])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

"""What the device reaches at most, measured: bytes per second of a large copy, FLOPs per second of a large matmul."""

from dataclasses import dataclass
from statistics import median

import torch

from bench.measure import Contender, take_turns

COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes, far more than the caches hold
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices


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

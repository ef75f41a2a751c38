"""Figures of the GPUs that bench/predict.py knows; gpus.toml has them, each with its source.

Multiprocessors, and what one of them holds, are in cge_kernels.tools.gpus. The measured figures are those of
github.com/te42kyfo/gpu-benches: gpu-l2-cache (bandwidth of sets that fit in L2), gpu-latency and cuda-latency (pointer
chase through sets beyond L2), gpu-small-kernels (kernels that move 64 KB, one after the other). Where it has not
measured the GPU itself, a source names the one that it did.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from cge_kernels.tools.gpus import HARDWARE, Hardware


@dataclass(frozen=True)
class GPU:
    """A GPU's figures.

    family: its key in HARDWARE. memory_bandwidth, l2_bandwidth: bytes/s. tensor_rate: FLOP/s of dense bfloat16 and
    float16 products with float32 sums. vector_rate: FLOP/s in float32 without tensor cores. special_rate: exp2 or log2
    in a second. memory_latency: seconds from a load to its number, past L2. launch: seconds from the start of a kernel
    that does next to nothing to the start of the one that follows it.
    """

    name: str
    family: str
    memory_bandwidth: float
    tensor_rate: float
    vector_rate: float
    special_rate: float
    l2_bandwidth: float
    memory_latency: float
    launch: float

    @property
    def hardware(self) -> Hardware:
        """What one multiprocessor holds."""
        return HARDWARE[self.family]

    @property
    def multiprocessors(self) -> int:
        """How many there are."""
        return self.hardware.target.multiprocessors


GPUS = {
    name: GPU(**figures) for name, figures in tomllib.loads(Path(__file__).with_suffix(".toml").read_text()).items()
}

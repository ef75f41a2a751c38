"""Figures of the GPUs that bench/predict.py knows, each with its source.

Multiprocessors, and what one of them holds, are in cge_kernels.tools.gpus. The measured figures are those of
github.com/te42kyfo/gpu-benches: gpu-l2-cache (bandwidth of sets that fit in L2), gpu-latency and cuda-latency (pointer
chase through sets beyond L2), gpu-small-kernels (kernels that move 64 KB, one after the other). Where it has not
measured the GPU itself, a source names the one that it did. A figure that nobody measured or published says so with
the word "assumption".
"""

from dataclasses import dataclass

from cge_fast.errors import UserError
from cge_kernels.tools.gpus import HARDWARE, Hardware


@dataclass(frozen=True)
class GPU:
    """A GPU's figures, and where they come from.

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
    data_sheet: str
    special_rate: float
    special_source: str
    l2_bandwidth: float
    l2_source: str
    memory_latency: float
    latency_source: str
    launch: float
    launch_source: str

    @property
    def hardware(self) -> Hardware:
        """What one multiprocessor holds."""
        return HARDWARE[self.family]

    @property
    def multiprocessors(self) -> int:
        """How many there are."""
        return self.hardware.target.multiprocessors


CUDA_GUIDE = "CUDA C++ Programming Guide: 16 a clock in a multiprocessor, at the data sheet's clock"

GPUS = {
    "h100": GPU(
        "H100 SXM5",
        "sm_90",
        memory_bandwidth=3.35e12,
        tensor_rate=989e12,
        vector_rate=67e12,
        data_sheet="NVIDIA H100 data sheet, SXM5",
        special_rate=67e12 / 16,
        special_source=CUDA_GUIDE,
        l2_bandwidth=9.7e12,
        l2_source="gpu-benches on an H200, the same chip and as many multiprocessors (an H100 PCIe, 114: 6.9 TB/s)",
        memory_latency=370e-9,
        latency_source="gpu-benches on an H100 PCIe: 650 cycles at 1755 MHz",
        launch=2.5e-6,
        launch_source="gpu-benches on an H200",
    ),
    "a100": GPU(
        "A100 SXM4 80 GB",
        "sm_80",
        memory_bandwidth=2.039e12,
        tensor_rate=312e12,
        vector_rate=19.5e12,
        data_sheet="NVIDIA A100 data sheet, SXM4 80 GB",
        special_rate=19.5e12 / 8,
        special_source=CUDA_GUIDE,
        l2_bandwidth=5.4e12,
        l2_source="gpu-benches on an A100 80 GB",
        memory_latency=405e-9,
        latency_source="gpu-benches on an A100 80 GB: 571 cycles at 1410 MHz",
        launch=2.7e-6,
        launch_source="gpu-benches on an A100 80 GB",
    ),
    "rtx4090": GPU(
        "RTX 4090",
        "sm_89",
        memory_bandwidth=1.008e12,
        tensor_rate=165.2e12,
        vector_rate=82.6e12,
        data_sheet="NVIDIA Ada GPU architecture white paper, GeForce RTX 4090",
        special_rate=82.6e12 / 16,
        special_source=CUDA_GUIDE,
        l2_bandwidth=5.2e12,
        l2_source="gpu-benches on an L40, the same chip with 142 multiprocessors, not 128",
        memory_latency=253e-9,
        latency_source="gpu-benches on an L40, whose memory is GDDR6, not GDDR6X: 631 cycles at 2490 MHz",
        launch=1.6e-6,
        launch_source="gpu-benches on an L40",
    ),
    "mi300x": GPU(
        "MI300X",
        "gfx942",
        memory_bandwidth=5.3e12,
        tensor_rate=1307.4e12,
        vector_rate=163.4e12,
        data_sheet="AMD Instinct MI300X data sheet",
        special_rate=163.4e12 / 16,
        special_source="assumption: 16 a clock in a multiprocessor, at the data sheet's clock",
        l2_bandwidth=11.9e12,
        l2_source="Chips and Cheese on an MI300X: the Infinity Cache, which all dies share; each die's L2 is faster",
        memory_latency=390e-9,
        latency_source="assumption: as gpu-benches measured an MI210, 655 cycles at 1700 MHz",
        launch=2.5e-6,
        launch_source="assumption: as gpu-benches measured an MI210",
    ),
}


def named(name: str) -> GPU:
    """The GPU of this name.

    Raises:
        UserError: the name is unknown.
    """
    if name not in GPUS:
        raise UserError(f"gpu: must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name]

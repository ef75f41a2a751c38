"""What the operators should take on a GPU: predicted, not measured.

Three things are known without the GPU: the bytes that each launch loads and stores, which bench/count/traffic.py
counts with the GPU's tiles in a process of its own (compiled and interpreted kernels cannot mix in one); what each
kernel needs once compiled for the GPU, and so how many programs a multiprocessor holds; and the FLOPs, by formula. The
figures of bench/gpus.toml make times of them, by the formulas in the docstrings of `KernelPrediction` and below it.

Nothing here is a timing. Measured on the GPU, `operators` shows its times beside the prediction in the same results
file. The model is weak where
- rates and bandwidths are the data sheet's, which no kernel quite reaches, and caches are cold: what an earlier kernel
  left in L2 is loaded from memory again;
- a program's bytes in flight are a guess (`bytes_in_flight`): shared memory may hold other things than what is being
  loaded, and the compiler may issue several loads before it waits;
- every load waits as long as one from memory, even if L2 serves it;
- of the mathematics only matmuls and the powers of GeM count, and a matmul runs at the full rate whatever its tiles;
- the last wave of programs, which may be nearly empty, is shown but not charged;
- bytes are those of elements, not of the sectors that move;
- the host is ahead of the GPU: what Python and Triton's launcher take is not in it;
- an ATen operation beside the kernels takes a launch and its bytes or, in a matmul, its FLOPs at full rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

import cge_kernels
from bench.cases import OURS, POOLINGS, Case
from bench.count import traffic
from bench.count.operations import Operation
from bench.count.traffic import Problem
from bench.gpus import GPU, GPUS
from bench.results import Figure
from bench.shapes import DTYPES, SHAPES
from cge_fast.errors import UserError
from cge_kernels.common.device_functions import INTERPRETED
from cge_kernels.tools import compiler

THREAD_BYTES = 16  # the widest load of one thread
# Of one number of the map: x^p forward; backward log2 x and a power for each of two features (three in a shared row).
SPECIAL = {"stripe_pool_kernel": 2, "stripe_pool_backward_kernel": 3}
MICRO = 1e6


@dataclass(frozen=True)
class KernelPrediction:
    """One launch on one GPU: first what was counted and compiled, then what follows from it.

    programs: of the grid; occupancy: how many of them a multiprocessor holds, and `limit` what limits that; in_flight:
    bytes that the loads of one program keep in flight. loaded, stored: bytes of all accesses; distinct: bytes of the
    elements that these touch. flops, at `rate` FLOP/s; special: exp2 and log2.
    """

    kernel: str
    gpu: GPU
    programs: int
    occupancy: int
    limit: str
    in_flight: int
    loaded: int
    stored: int
    distinct: int
    flops: int
    rate: float
    special: int

    @property
    def resident(self) -> int:
        """min(programs, occupancy * multiprocessors): programs that run at once"""
        return min(self.programs, self.occupancy * self.gpu.multiprocessors)

    @property
    def waves(self) -> int:
        """programs / (occupancy * multiprocessors), rounded up"""
        return ceil(self.programs / (self.occupancy * self.gpu.multiprocessors))

    @property
    def tail(self) -> float:
        """share of the last wave's places that have a program"""
        return self.programs / (self.occupancy * self.gpu.multiprocessors) - (self.waves - 1)

    @property
    def busy(self) -> float:
        """min(1, programs / multiprocessors): share of the multiprocessors that have a program"""
        return min(1.0, self.programs / self.gpu.multiprocessors)

    @property
    def memory_us(self) -> float:
        """distinct bytes / memory bandwidth"""
        return self.distinct / self.gpu.memory_bandwidth * MICRO

    @property
    def latency_us(self) -> float:
        """loaded bytes * memory latency / (resident * in flight): Little's law, what so few programs can draw"""
        return self.loaded * self.gpu.memory_latency / (self.resident * self.in_flight) * MICRO

    @property
    def l2_us(self) -> float:
        """(loaded + stored bytes) / (L2 bandwidth * busy)"""
        return (self.loaded + self.stored) / (self.gpu.l2_bandwidth * self.busy) * MICRO

    @property
    def math_us(self) -> float:
        """(FLOPs / rate + special functions / their rate) / busy"""
        return (self.flops / self.rate + self.special / self.gpu.special_rate) / self.busy * MICRO

    @property
    def bounds(self) -> dict[str, float]:
        """memory, latency, L2 and math: what may hold the kernel up"""
        return {"memory": self.memory_us, "latency": self.latency_us, "L2": self.l2_us, "math": self.math_us}

    @property
    def launch_us(self) -> float:
        """from one kernel to the next, if it does next to nothing"""
        return self.gpu.launch * MICRO

    @property
    def predicted_us(self) -> float:
        """launch + max(memory, latency, L2, math)"""
        return self.launch_us + max(self.bounds.values())

    @property
    def bound_by(self) -> str:
        """the largest of launch, memory, latency, L2 and math"""
        times = {"launch": self.launch_us, **self.bounds}
        return max(times, key=times.get)


@dataclass(frozen=True)
class OperatorPrediction:
    """A direction of an operator: its launches, the ATen operations beside them, and what it takes at least.

    aten_us: of those operations together, as `aten_us` says. floor_us: max(compulsory bytes / memory bandwidth,
    FLOPs / rate), both as bench/work.py has them.
    """

    case: Case
    direction: str
    kernels: tuple[KernelPrediction, ...]
    aten: tuple[str, ...]
    aten_us: float
    floor_us: float

    @property
    def predicted_us(self) -> float:
        """sum over its kernels and over the ATen operations beside them"""
        return sum(kernel.predicted_us for kernel in self.kernels) + self.aten_us


def bytes_in_flight(launch: cge_kernels.Launch, shared: int, warp_size: int) -> int:
    """a program's shared memory if it loads ahead (num_stages > 1), but at least 16 bytes in each of its threads"""
    one_load = THREAD_BYTES * launch.options["num_warps"] * warp_size
    return max(one_load, shared) if launch.options["num_stages"] > 1 else one_load


def flops(launch: cge_kernels.Launch) -> int:
    """2 * samples * classes * (stripes * channels + the classifier's channels) in a matmul, else not counted"""
    if "PRECISION" not in launch.constants:
        return 0
    depth = launch.constants["STRIPES"] * launch.args["channels"] + launch.args.get("feature_channels", 0)
    return 2 * launch.args["batch"] * launch.args["classes"] * depth


def rate(launch: cge_kernels.Launch, gpu: GPU) -> float:
    """of the tensor cores in a 16-bit matmul, else of float32 (torch's matmul precision is "highest", its default)"""
    is_matmul = "PRECISION" in launch.constants
    return gpu.tensor_rate if is_matmul and launch.args["memory_ptr"].itemsize == 2 else gpu.vector_rate


def aten_us(operation: Operation, gpu: GPU) -> float:
    """launch + max(bytes / memory bandwidth, FLOPs / rate), the tensor cores' rate for 16-bit operands"""
    rate = gpu.vector_rate if operation.dtype is None or operation.dtype.itemsize == 4 else gpu.tensor_rate
    return (gpu.launch + max(operation.moved / gpu.memory_bandwidth, operation.flops / rate)) * MICRO


def special(launch: cge_kernels.Launch) -> int:
    """exp2 and log2 of GeM: 2 for each number of the map forward, 3 backward"""
    has_power = isinstance(launch.args.get("p_ptr"), Tensor)
    return SPECIAL[launch.kernel.__name__] * launch.args["map_ptr"].numel() if has_power else 0


def predict_kernel(gpu: GPU, launch: cge_kernels.Launch, rows: list[traffic.Traffic]) -> KernelPrediction:
    """A launch, compiled for the GPU, with its traffic."""
    target = gpu.hardware.target
    needs = compiler.measure(compiler.compile_launch(launch, target), target)
    occupancy, limit = gpu.hardware.occupancy(needs.registers, needs.shared, launch.options["num_warps"])
    return KernelPrediction(
        kernel=launch.kernel.__name__,
        gpu=gpu,
        programs=launch.grid[0],
        occupancy=occupancy,
        limit=limit,
        in_flight=bytes_in_flight(launch, needs.shared, target.warp_size),
        loaded=sum(row.loaded for row in rows),
        stored=sum(row.stored for row in rows),
        distinct=sum(row.distinct for row in rows),
        flops=flops(launch),
        rate=rate(launch, gpu),
        special=special(launch),
    )


def predict(gpu: GPU, problem: Problem) -> list[OperatorPrediction]:
    """Predictions of the operators, in the step's order. It takes minutes at the larger shapes.

    Raises:
        UserError: kernels are interpreted in this process, or this Triton cannot compile for the GPU.
    """
    if INTERPRETED.value:
        raise UserError("TRITON_INTERPRET: must not be set, since interpreted kernels cannot be compiled, got 1")
    if reason := compiler.why_not(gpu.hardware.target):
        raise UserError(f"gpu: {gpu.name} cannot be predicted here: {reason}")
    counted = traffic.interpreted(traffic.count_traffic, problem, gpu.hardware.target)
    predictions, number = [], 0
    for (case, direction), (launches, aten) in traffic.watch(problem, OURS, gpu.hardware.target).items():
        kernels = []
        for launch in tqdm(launches, desc=f"compiling {case}, {direction}", unit=" kernel", leave=False):
            kernels.append(predict_kernel(gpu, launch, [row for row in counted if row.launch == number]))
            number += 1
        least = problem.work_of(case)[direction]
        fastest = max(kernel.rate for kernel in kernels)
        floor = max(least.bytes / gpu.memory_bandwidth, least.flops / fastest) * MICRO
        names, beside = tuple(found.name for found in aten), sum(aten_us(found, gpu) for found in aten)
        predictions.append(OperatorPrediction(case, direction, tuple(kernels), names, beside, floor))
    return predictions


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench predict`."""
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="whose figures are taken")
    parser.add_argument("--shape", choices=list(SHAPES), default="msmt17", help="B, C, H, W, n and N")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the map and the memory read")
    parser.add_argument("--poolings", nargs="+", choices=POOLINGS, default=list(POOLINGS), help="default both")
    parser.add_argument("--details", action="store_true", help="also programs, bytes, FLOPs and bounds of each kernel")


def measure(gpu: str, shape: str, dtype: str, poolings: list[str], details: bool) -> Iterator[Figure]:
    """Predicted time and floor of each operator and direction, and of the head's step; with details of each kernel."""
    figures = GPUS[gpu]
    print(f"PREDICTION for {figures.name}: nothing was measured, every time is computed.")
    print("Formulas and what they leave out: bench/predict.py. The GPU's figures: bench/gpus.toml.\n")
    predictions = predict(figures, Problem(SHAPES[shape], dtype, tuple(poolings)))
    yield from operator_figures(f"{shape}, {dtype}, {figures.name}", poolings, predictions)
    if details:
        yield from kernel_figures(f"{shape}, {dtype}, {figures.name}", predictions)


def operator_figures(setting: str, poolings: list[str], predictions: list[OperatorPrediction]) -> Iterator[Figure]:
    """Under the names that `operators` has for them; the last are the head's steps with the memory's write."""
    times = {(str(one.case), one.direction): (one.predicted_us, one.floor_us) for one in predictions}
    for pooling in poolings:
        parts = [one for one in predictions if traffic.is_in_step(one.case, pooling)]
        total = sum(one.predicted_us for one in parts), sum(one.floor_us for one in parts)
        times[f"head and write, {pooling}", "step"] = total
    for (subject, direction), (predicted, floor) in times.items():
        yield Figure("predict", setting, subject, "predicted", direction, "s", predicted / MICRO)
        yield Figure("predict", setting, subject, "floor", direction, "s", floor / MICRO)


def kernel_figures(setting: str, predictions: list[OperatorPrediction]) -> Iterator[Figure]:
    """What was counted and compiled of each kernel, and the times that may hold it up."""
    for one in predictions:
        for k in one.kernels:
            subject = f"{one.case}, {one.direction}: {k.kernel}"
            place = "predicted kernels", setting, subject, f"bound by {k.bound_by}, occupancy by {k.limit}"
            counts = {"programs": k.programs, "per multiprocessor": k.occupancy, "waves": k.waves, "last wave": k.tail}
            counts["exp2 and log2"] = k.special
            moved = {"in flight": k.in_flight, "distinct": k.distinct, "all": k.loaded + k.stored}
            times = {**k.bounds, "launch": k.launch_us, "predicted": k.predicted_us}
            times = {name: value / MICRO for name, value in times.items()}
            for unit, values in (("", counts), ("B", moved), ("FLOP", {"products": k.flops}), ("s", times)):
                yield from (Figure(*place, name, unit, value) for name, value in values.items())

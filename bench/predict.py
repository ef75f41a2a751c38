"""What the operators should take on a GPU, predicted, not measured: python -m bench.predict --gpu h100

The step is that of bench/traffic.py, on a named shape. Three things are known without the GPU: the bytes that each
launch loads and stores, which bench.traffic counts with the GPU's tiles in a process of its own (compiled and
interpreted kernels cannot mix in one); what each kernel needs once compiled for the GPU, and so how many programs a
multiprocessor holds; and the FLOPs, by formula. The figures of bench/gpus.py make times of them, by the formulas in
`KernelPrediction`, which the program prints below its tables.

Nothing here is a timing. Whoever has the GPU can hold the prediction against it; the model is weak where
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

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import getdoc
from math import ceil
from pathlib import Path

from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

import cge_kernels
from bench.gpus import GPU, GPUS
from bench.gpus import named as gpu_named
from bench.launches import DTYPES, POOLINGS
from bench.operations import Operation, Operations
from bench.shapes import SHAPES
from bench.shapes import named as shapes_named
from bench.tables import table
from bench.traffic import STEP, Problem, compulsory, step
from cge_fast import errors
from cge_fast.errors import UserError
from cge_kernels.common.device_functions import INTERPRETED
from cge_kernels.tools.compile import compile_launch, measure

PROGRAM = "bench.predict"
ROOT = Path(__file__).parents[1]
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
    """An operator of the step: its launches, the ATen operations beside them, and what it takes at least.

    aten_us: of those operations together, as `aten_us` says. floor_us: max(compulsory bytes / memory bandwidth,
    FLOPs / rate), both as bench/work.py has them.
    """

    operator: str
    kernels: tuple[KernelPrediction, ...]
    aten: tuple[str, ...]
    aten_us: float
    floor_us: float

    @property
    def predicted_us(self) -> float:
        """sum over its kernels and over the ATen operations beside them"""
        return sum(kernel.predicted_us for kernel in self.kernels) + self.aten_us


def count_traffic(gpu: GPU, problem: Problem) -> list[dict]:
    """The rows that bench.traffic prints as JSON, with the GPU's tiles; its progress shows on stderr."""
    options = [f"--{name}={str(value).lower()}" for name, value in asdict(problem).items()]
    command = [sys.executable, "-m", "bench.traffic", "--json", "--target", gpu.family, *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return json.loads(subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def take_launches(gpu: GPU, problem: Problem) -> dict[str, tuple[list[cge_kernels.Launch], list[Operation]]]:
    """The same step's launches, which do not run, and the ATen operations beside them, by operator."""
    taken = {}

    @contextmanager
    def operator(name: str) -> Iterator[None]:
        launches: list[cge_kernels.Launch] = []
        with cge_kernels.launching(launches.append, gpu.hardware.target), Operations() as operations:
            yield
        taken[name] = launches, operations.found

    with cge_kernels.backend("triton"):
        step(cge_kernels, problem, operator)
    return taken


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
    return gpu.tensor_rate if is_matmul and launch.args["memory_pointer"].itemsize == 2 else gpu.vector_rate


def aten_us(operation: Operation, gpu: GPU) -> float:
    """launch + max(bytes / memory bandwidth, FLOPs / rate), the tensor cores' rate for 16-bit operands"""
    rate = gpu.vector_rate if operation.dtype is None or operation.dtype.itemsize == 4 else gpu.tensor_rate
    return (gpu.launch + max(operation.moved / gpu.memory_bandwidth, operation.flops / rate)) * MICRO


def special(launch: cge_kernels.Launch) -> int:
    """exp2 and log2 of GeM: 2 for each number of the map forward, 3 backward"""
    has_power = isinstance(launch.args.get("p_pointer"), Tensor)
    return SPECIAL[launch.kernel.__name__] * launch.args["map_pointer"].numel() if has_power else 0


def predict_kernel(gpu: GPU, launch: cge_kernels.Launch, rows: list[dict]) -> KernelPrediction:
    """A launch, compiled for the GPU, with its rows of bench.traffic."""
    target = gpu.hardware.target
    needs = measure(compile_launch(launch, target), target)
    occupancy, limit = gpu.hardware.occupancy(needs.registers, needs.shared, launch.options["num_warps"])
    return KernelPrediction(
        kernel=launch.kernel.__name__,
        gpu=gpu,
        programs=launch.grid[0],
        occupancy=occupancy,
        limit=limit,
        in_flight=bytes_in_flight(launch, needs.shared, target.warp_size),
        loaded=sum(row["loaded"] for row in rows),
        stored=sum(row["stored"] for row in rows),
        distinct=sum(row["distinct_loaded"] + row["distinct_stored"] for row in rows),
        flops=flops(launch),
        rate=rate(launch, gpu),
        special=special(launch),
    )


def predict(gpu: str, shape: str, dtype: str, pooling: str) -> list[OperatorPrediction]:
    """Predictions of the step's operators, in its order. It takes minutes at the larger shapes.

    gpu: of bench.gpus; shape: of bench.shapes; dtype: of the map and of the memory that revision reads, "float32",
    "bfloat16" or "float16"; pooling: "average" or "gem".

    Raises:
        UserError: the GPU or the shape is unknown, or kernels are interpreted in this process.
    """
    figures = gpu_named(gpu)
    problem = Problem(**asdict(shapes_named([shape])[shape]), dtype=dtype, pooling=pooling)
    if INTERPRETED.value:
        raise UserError("TRITON_INTERPRET: must not be set, since interpreted kernels cannot be compiled, got 1")
    counted, taken = count_traffic(figures, problem), take_launches(figures, problem)
    launches = [(operator, launch) for operator, (found, _) in taken.items() for launch in found]
    kernels: dict[str, list[KernelPrediction]] = {operator: [] for operator in taken}
    for number, (operator, launch) in enumerate(tqdm(launches, desc="compiling", unit=" kernel", leave=False)):
        rows = [row for row in counted if row["launch"] == number]
        kernels[operator].append(predict_kernel(figures, launch, rows))
    predictions = []
    for operator, needed in compulsory(problem).items():
        aten = taken[operator][1]
        fastest = max(kernel.rate for kernel in kernels[operator])
        floor = max(needed.bytes / figures.memory_bandwidth, needed.flops / fastest) * MICRO
        names, beside = tuple(found.name for found in aten), sum(aten_us(found, figures) for found in aten)
        predictions.append(OperatorPrediction(operator, tuple(kernels[operator]), names, beside, floor))
    return predictions


def gpu_rows(gpu: GPU) -> list[tuple[str, ...]]:
    """Rows of the table of figures."""
    return [
        ("multiprocessors", f"{gpu.multiprocessors}", f"cge_kernels.tools.gpus, {gpu.family}"),
        ("memory bandwidth", f"{gpu.memory_bandwidth / 1e12:g} TB/s", gpu.data_sheet),
        ("matmul rate, 16-bit", f"{gpu.tensor_rate / 1e12:g} TFLOP/s", gpu.data_sheet),
        ("float32 rate", f"{gpu.vector_rate / 1e12:g} TFLOP/s", gpu.data_sheet),
        ("exp2 and log2", f"{gpu.special_rate / 1e12:.3g} T/s", gpu.special_source),
        ("L2 bandwidth", f"{gpu.l2_bandwidth / 1e12:g} TB/s", gpu.l2_source),
        ("memory latency", f"{gpu.memory_latency * 1e9:g} ns", gpu.latency_source),
        ("launch", f"{gpu.launch * MICRO:g} us", gpu.launch_source),
    ]


def kernel_rows(predictions: list[OperatorPrediction]) -> list[tuple[str, ...]]:
    """Rows of the table of kernels."""
    return [
        (
            *(prediction.operator, k.kernel, f"{k.programs:,}", f"{k.occupancy} ({k.limit})"),
            *(f"{k.waves}, last {k.tail:.0%}", f"{k.in_flight / 1e3:.1f}", f"{k.distinct / 1e6:.2f}"),
            *(f"{(k.loaded + k.stored) / 1e6:.2f}", f"{k.flops / 1e9:.2f}", f"{k.special / 1e9:.2f}"),
            *(f"{time:.1f}" for time in (*k.bounds.values(), k.launch_us, k.predicted_us)),
            k.bound_by,
        )
        for prediction in predictions
        for k in prediction.kernels
    ]


def operator_rows(predictions: list[OperatorPrediction]) -> list[tuple[str, ...]]:
    """Rows of the table of operators; the last is the whole step."""
    totals = [(p.operator, p.predicted_us, p.floor_us, " ".join(p.aten)) for p in predictions]
    step_us, step_floor = (sum(total[column] for total in totals if total[0] in STEP) for column in (1, 2))
    return [
        (name, f"{time:.1f}", f"{floor:.1f}", f"{time / floor:.1f}", beside)
        for name, time, floor, beside in [*totals, ("step", step_us, step_floor, "")]
    ]


def formulas() -> list[str]:
    """What the columns are computed by: the docstrings of what computes them."""
    inputs = {"in flight": bytes_in_flight, "FLOP": flops, "rate": rate, "special": special}
    derived = {name: value for name, value in vars(KernelPrediction).items() if isinstance(value, property)}
    return [
        "Formulas, of a kernel:",
        *(f"- {name} = {getdoc(value)}" for name, value in (inputs | derived).items()),
        f"of an ATen operation: {getdoc(aten_us)}",
        "of an operator:",
        f"- predicted_us = {getdoc(OperatorPrediction.predicted_us)}",
        "- floor_us = max(compulsory bytes / memory bandwidth, FLOPs / rate), both as bench/work.py has them",
        "What the model leaves out: the docstring of bench/predict.py.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Predicts what each operator takes on a GPU from counted bytes, FLOPs, launches and compiled "
        "kernels, and prints the formulas. Nothing is measured. At the paper's shape it takes a minute or two.",
        exit_on_error=False,
    )
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--shape", default="msmt17", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the map and the memory that is read")
    parser.add_argument("--pooling", choices=POOLINGS, default="gem", help="of the map")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    predictions = predict(options.gpu, options.shape, options.dtype, options.pooling)
    gpu = GPUS[options.gpu]
    print(f"PREDICTION for {gpu.name}: nothing was measured, every time is computed by the formulas below.")
    print(f"{SHAPES[options.shape]}, {options.dtype}, {options.pooling} pooling\n")
    print(table(("figure", "value", "source"), gpu_rows(gpu), options.markdown), end="\n\n")
    header = (
        *("operator", "kernel", "programs", "per multiprocessor", "waves", "in flight kB", "distinct MB", "all MB"),
        *("GFLOP", "special G", "memory us", "latency us", "L2 us", "math us", "launch us", "predicted us", "bound by"),
    )
    print(table(header, kernel_rows(predictions), options.markdown), end="\n\n")
    header = ("operator", "predicted us", "floor us", "ratio", "ATen operations beside")
    print(table(header, operator_rows(predictions), options.markdown), end="\n\n")
    print("\n".join(formulas()))


if __name__ == "__main__":
    errors.run(main, PROGRAM)

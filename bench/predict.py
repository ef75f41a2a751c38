"""What the operators should take on a GPU: a prediction, not a measurement.

Known without the GPU are the bytes that each launch loads and stores (bench/count/traffic.py, with the GPU's tiles, in
a process of its own: compiled and interpreted kernels cannot mix in one), what each kernel needs once it is compiled
for the GPU, and the FLOPs, by formula. With the figures of bench/gpus.toml, a kernel takes

    resident  = min(programs, occupancy * multiprocessors): programs that run at once
    busy      = min(1, programs / multiprocessors): share of the multiprocessors that have a program
    memory    = distinct bytes / memory bandwidth
    latency   = loaded bytes * memory latency / (resident * bytes in flight): Little's law, what so few programs draw
    L2        = (loaded + stored bytes) / (L2 bandwidth * busy)
    math      = (FLOPs / rate + (exp2 and log2) / their rate) / busy
    predicted = launch + max(memory, latency, L2, math)

where the bytes in flight are a program's shared memory if it loads ahead (num_stages > 1), else 16 bytes in each of its
threads, once for each of the PARTS that it adds, or a pooling kernel's tile of the map if that is more. In one pass
pooling and revision count like kernels, and the barrier between them like a launch. An ATen operation beside takes

    launch + max(bytes / memory bandwidth, FLOPs / rate)

and an operator the sum of both. Its floor is max(compulsory bytes / memory bandwidth, FLOPs / rate), as bench/work.py
has them. The model is weak where
- rates and bandwidths are the data sheet's, which no kernel quite reaches, and caches are cold: what an earlier kernel
  left in L2 is loaded from memory again;
- the bytes in flight are a guess: shared memory may hold other things than what is being loaded, and the compiler may
  issue several loads before it waits;
- every load waits as long as one from memory, even if L2 serves it;
- of the mathematics only matmuls and the powers of GeM count, and a matmul runs at the full rate whatever its tiles;
- the last wave of programs, which may be nearly empty, is shown but not charged;
- bytes are those of elements, not of the sectors that move;
- the host is ahead of the GPU: what Python and Triton's launcher take is not in it.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from bench.cases import OURS
from bench.count.operations import Operation
from bench.count.traffic import Place, Problem, Traffic, by_subject, count_traffic, interpreted, watch
from bench.results import Figure
from bench.shapes import DTYPES, SHAPES
from cge_fast.errors import UserError
from cge_kernels import Launch
from cge_kernels.common.device_functions import INTERPRETED
from cge_kernels.common.tiles import cdiv
from cge_kernels.tools import compiler
from cge_kernels.tools.gpus import HARDWARE, Hardware

GPUS = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text())
THREAD_BYTES = 16  # the widest load of one thread
# Of one number of the map: x^p forward; backward log2 x and a power for each of two features (three in a shared row).
SPECIAL = {"stripe_pool_kernel": 2, "stripe_pool_backward_kernel": 3, "one_pass_kernel": 2}
POOLED_FROM, POOLED_INTO = {"map", "p"}, {"local", "converted", "local_cast", "partial_sq_norms"}  # in one pass


class Kernel(NamedTuple):
    """What was counted and compiled of a launch.

    programs: of the grid; occupancy: how many of them a multiprocessor holds, and `limit` what limits that. in_flight:
    bytes that the loads of one program keep in flight. loaded, stored: bytes of all accesses; distinct: of the elements
    that these touch. flops: of a matmul, else 0, and the dtype of its operands; special: exp2 and log2.
    """

    name: str
    programs: int
    occupancy: int
    limit: str
    in_flight: int
    loaded: int
    stored: int
    distinct: int
    flops: int
    dtype: torch.dtype
    special: int


def times(kernel: Kernel, gpu: dict) -> dict[str, float]:
    """Seconds that may hold a kernel up, and "predicted", by the formulas above."""
    multiprocessors = HARDWARE[gpu["family"]].target.multiprocessors
    resident = min(kernel.programs, kernel.occupancy * multiprocessors)
    busy = min(1.0, kernel.programs / multiprocessors)
    bounds = {
        "memory": kernel.distinct / gpu["memory_bandwidth"],
        "latency": kernel.loaded * gpu["memory_latency"] / (resident * kernel.in_flight),
        "L2": (kernel.loaded + kernel.stored) / (gpu["l2_bandwidth"] * busy),
        "math": (kernel.flops / rate(kernel.dtype, gpu) + kernel.special / gpu["special_rate"]) / busy,
    }
    return bounds | {"launch": gpu["launch"], "predicted": gpu["launch"] + max(bounds.values())}


def aten_seconds(operation: Operation, gpu: dict) -> float:
    """Of an ATen operation, by the formula above."""
    computing = operation.flops / rate(operation.dtype, gpu)
    return gpu["launch"] + max(operation.moved / gpu["memory_bandwidth"], computing)


def rate(dtype: torch.dtype | None, gpu: dict) -> float:
    """Of the tensor cores for 16-bit operands, else of float32 (torch's matmul precision is "highest", its default)."""
    return gpu["tensor_rate"] if dtype is not None and dtype.itemsize == 2 else gpu["vector_rate"]


def describe(launch: Launch, hardware: Hardware, traffic: list[Traffic]) -> list[Kernel]:
    """A launch, compiled for the GPU, with its traffic; one pass as its two phases.

    FLOPs of a matmul: 2 * samples * classes * (stripes * channels + the classifier's channels). exp2 and log2 of GeM: 2
    for each number of the map forward, 3 backward.
    """
    args, constants, options, target = launch.args, launch.constants, launch.options, hardware.target
    needs = compiler.measure(compiler.compile_launch(launch, target), target)
    one_load = THREAD_BYTES * options["num_warps"] * target.warp_size * constants.get("PARTS", 1)
    flops, special, dtype = 0, 0, torch.float32
    if "PRECISION" in constants:
        depth = constants["STRIPES"] * args["channels"] + args.get("feature_channels", 0)
        flops, dtype = 2 * args["batch"] * args["classes"] * depth, args["memory_ptr"].dtype
    if isinstance(args.get("p_ptr"), Tensor):
        special = SPECIAL[launch.kernel.__name__] * args["map_ptr"].numel()
    if "BLOCK_S" in constants:
        one_load = max(one_load, constants["BLOCK_C"] * constants["BLOCK_S"] * args["map_ptr"].itemsize)
    kernel = Kernel(
        launch.kernel.__name__,
        launch.grid[0],
        *hardware.occupancy(needs.registers, needs.shared, options["num_warps"]),
        in_flight=max(one_load, needs.shared) if options["num_stages"] > 1 else one_load,
        loaded=sum(one.loaded for one in traffic),
        stored=sum(one.stored for one in traffic),
        distinct=sum(one.distinct for one in traffic),
        flops=flops,
        dtype=dtype,
        special=special,
    )
    if "launch_cooperative_grid" not in options:
        return [kernel]
    loads = [one for one in traffic if one.tensor in POOLED_FROM]
    stores = [one for one in traffic if one.tensor in POOLED_INTO]
    pool_tiles = args["batch"] * cdiv(args["channels"], constants["BLOCK_C"])
    tiles = cdiv(args["batch"], constants["BLOCK_B"]) * cdiv(args["classes"], constants["BLOCK_N"])
    pooling = kernel._replace(
        name=f"{kernel.name}, pooling",
        programs=min(kernel.programs, pool_tiles),
        in_flight=one_load,
        loaded=sum(one.loaded for one in loads),
        stored=sum(one.stored for one in stores),
        distinct=sum(one.distinct_loaded for one in loads) + sum(one.distinct_stored for one in stores),
        flops=0,
    )
    revision = kernel._replace(
        name=f"{kernel.name}, revision",
        programs=min(kernel.programs, tiles),
        loaded=kernel.loaded - pooling.loaded,
        stored=kernel.stored - pooling.stored,
        distinct=kernel.distinct - pooling.distinct,
        special=0,
    )
    return [pooling, revision]


def predict(gpu: dict, problem: Problem) -> dict[Place, tuple[list[Kernel], list[Operation]]]:
    """Kernels and ATen operations of the operators, in the step's order. It takes minutes at the larger shapes.

    Raises:
        UserError: kernels are interpreted in this process, or this Triton cannot compile for the GPU.
    """
    hardware = HARDWARE[gpu["family"]]
    if INTERPRETED.value:
        raise UserError("TRITON_INTERPRET: must not be set, since interpreted kernels cannot be compiled, got 1")
    if reason := compiler.why_not(hardware.target):
        raise UserError(f"gpu: {gpu['name']} cannot be predicted here: {reason}")
    traffic = interpreted(count_traffic, problem, hardware.target)
    found: dict[Place, tuple[list[Kernel], list[Operation]]] = {}
    number = 0
    for place, (launches, aten) in watch(problem.cases, OURS, problem, hardware.target).items():
        kernels = []
        for launch in launches:
            kernels += describe(launch, hardware, [one for one in traffic if one.launch == number])
            number += 1
        found[place] = kernels, aten
    return found


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench predict`."""
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="whose figures are taken")
    parser.add_argument("--shape", choices=list(SHAPES), default="msmt17", help="B, C, H, W, n and N")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the map and the memory read")


def measure(gpu: str, shape: str, dtype: str) -> Iterator[Figure]:
    """Predicted time and floor of each operator and direction and of the head's step; what is known of each kernel."""
    chosen, problem = GPUS[gpu], Problem(SHAPES[shape], dtype)
    print(f"PREDICTION for {chosen['name']}: nothing was measured, every time is computed.\n\n{__doc__}")
    setting, found = f"{shape}, {dtype}, {chosen['name']}", predict(chosen, problem)
    values: dict[Place, dict[str, float]] = {}
    for (case, direction), (kernels, aten) in found.items():
        least, fastest = problem.work_of(case)[direction], max(rate(kernel.dtype, chosen) for kernel in kernels)
        seconds = sum(times(kernel, chosen)["predicted"] for kernel in kernels)
        values[case, direction] = {
            "predicted": seconds + sum(aten_seconds(operation, chosen) for operation in aten),
            "floor": max(least.bytes / chosen["memory_bandwidth"], least.flops / fastest),
        }
    for subject, parts in by_subject(values, problem.poolings).items():
        for name, value in parts.items():
            yield Figure("predict", setting, subject, name, "time", "s", value)
    for place, (kernels, _) in found.items():
        for kernel in kernels:
            yield from kernel_figures(setting, place, kernel, chosen)


def kernel_figures(setting: str, place: Place, kernel: Kernel, gpu: dict) -> Iterator[Figure]:
    """What was counted and compiled of a kernel, and the times that may hold it up."""
    subject = f"{place[0]}, {place[1]}: {kernel.name} (occupancy by {kernel.limit})"
    waves = kernel.programs / (kernel.occupancy * HARDWARE[gpu["family"]].target.multiprocessors)
    quantities = {
        "": {
            "programs": kernel.programs,
            "occupancy": kernel.occupancy,
            "waves": waves,
            "exp2 and log2": kernel.special,
        },
        "B": {"in flight": kernel.in_flight, "distinct": kernel.distinct, "all": kernel.loaded + kernel.stored},
        "FLOP": {"products": kernel.flops},
        "s": times(kernel, gpu),
    }
    for unit, values in quantities.items():
        for name, value in values.items():
            yield Figure("predicted kernels", setting, subject, "predicted", name, unit, value)

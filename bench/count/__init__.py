"""Launches and bytes of a training step of the head, counted without a GPU.

bench/count/launches.py and bench/count/traffic.py say what counts. At the paper's shape it takes a minute or two.
"""

from collections import defaultdict
from collections.abc import Iterator

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from bench.cases import EAGER, OURS, POOLINGS, Case
from bench.count import launches, traffic
from bench.count.traffic import Problem
from bench.results import Figure
from bench.shapes import DTYPES, SHAPES, Shape
from cge_fast.errors import UserError
from cge_kernels.tools.gpus import HARDWARE


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench count`."""
    parser.add_argument("--shape", choices=list(SHAPES), default="msmt17", help="B, C, H, W, n and N")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the map and the memory read")
    parser.add_argument("--poolings", nargs="+", choices=POOLINGS, default=list(POOLINGS), help="default both")
    parser.add_argument("--target", choices=list(HARDWARE), default="sm_90", help="the GPU whose tiles run")
    parser.add_argument("--pool_samples", type=PositiveInt, default=1, help="samples that the pooling kernels run")
    parser.add_argument("--details", action="store_true", help="also launches by name and the bytes of each tensor")


def measure(
    shape: str, dtype: str, poolings: list[str], target: str, pool_samples: int, details: bool
) -> Iterator[Figure]:
    """Launches and the bytes of each operator; with details, launches by name and the bytes of each tensor."""
    chosen = SHAPES[shape]
    if chosen.batch % pool_samples:
        raise UserError(f"pool_samples: must divide the batch {chosen.batch}, got {pool_samples}")
    for pooling in poolings:
        yield from count_launches(f"{shape}, {dtype}", chosen, dtype, pooling, details)
    problem = Problem(chosen, dtype, tuple(poolings), pool_samples=pool_samples)
    found = traffic.interpreted(traffic.count_traffic, problem, HARDWARE[target].target)
    yield from count_bytes(f"{shape}, {dtype}, {target}", problem, found, HARDWARE[target].target)
    if details:
        yield from bytes_of_tensors(f"{shape}, {dtype}, {target}", found)


def count_launches(setting: str, shape: Shape, dtype: str, pooling: str, by_name: bool) -> Iterator[Figure]:
    """Of a step of the head and of one pass: our own kernels, all kernels and, if asked for, each by its name."""
    for case in (Case("head", pooling), Case("revise_logits_one_pass", pooling)):
        for contender in (OURS, EAGER):
            own, aten = launches.count(case, shape, dtype, contender)
            totals = {"own kernels": own.total(), "all kernels": own.total() + aten.total()}
            for quantity, value in totals.items():
                yield Figure("launches", setting, str(case), contender, quantity, "", value)
            for name, value in sorted((own | aten).items()) if by_name else ():
                yield Figure("launches by name", setting, str(case), contender, name, "", value)


def count_bytes(
    setting: str, problem: Problem, found: list[traffic.Traffic], target: traffic.Target
) -> Iterator[Figure]:
    """Of each operator and direction, and of the head's step: at least, ours and the eager reference's."""
    beside, eager = (
        {place: sum(operation.moved for operation in aten) for place, (_, aten) in watched.items()}
        for watched in (traffic.watch(problem, OURS, target), traffic.watch(problem, EAGER))
    )
    steps: dict[str, dict[str, int]] = {pooling: defaultdict(int) for pooling in problem.poolings}
    for case, direction in eager:
        mine = [one for one in found if one.operator == f"{case}, {direction}"]
        distinct = sum(one.distinct for one in mine if not one.is_scratch)
        scratch = beside[case, direction] + sum(one.distinct for one in mine if one.is_scratch)
        figures = {"at least": problem.work_of(case)[direction].bytes, "distinct": distinct}
        figures |= {"scratch and matmuls": scratch, OURS: distinct + scratch, EAGER: eager[case, direction]}
        for contender, value in figures.items():
            yield Figure("traffic", setting, f"{case}, {direction}", contender, "moved", "B", value)
            for pooling, step in steps.items():
                step[contender] += value if traffic.is_in_step(case, pooling) else 0
    for pooling, step in steps.items():
        for contender, value in step.items():
            yield Figure("traffic", setting, f"step, {pooling}", contender, "moved", "B", value)


def bytes_of_tensors(setting: str, found: list[traffic.Traffic]) -> Iterator[Figure]:
    """Of each tensor of each kernel: all accesses, and the distinct elements among them."""
    for one in found:
        if one.distinct:
            tensor = f"{one.tensor} (scratch)" if one.is_scratch else one.tensor
            place = "bytes of tensors", setting, f"{one.operator}: {one.kernel}", tensor
            yield Figure(*place, "loaded", "B", one.loaded)
            yield Figure(*place, "distinct loaded", "B", one.distinct_loaded)
            yield Figure(*place, "stored", "B", one.stored)
            yield Figure(*place, "distinct stored", "B", one.distinct_stored)

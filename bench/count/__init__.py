"""Launches and bytes of a training step of the head, counted without a GPU.

Launches of cge_kernels are seen instead of run; operations of PyTorch are counted as bench/count/operations.py says,
bytes as bench/count/traffic.py says. At the paper's shape it takes a minute or two.
"""

from collections import Counter
from collections.abc import Iterator

from jsonargparse import ArgumentParser

from bench.cases import EAGER, OURS, POOLINGS, Case
from bench.count.traffic import Place, Problem, Traffic, by_subject, count_traffic, interpreted, watch
from bench.results import Figure
from bench.shapes import DTYPES, SHAPES
from cge_kernels import Target
from cge_kernels.tools.gpus import HARDWARE


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench count`."""
    parser.add_argument("--shape", choices=list(SHAPES), default="msmt17", help="B, C, H, W, n and N")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the map and the memory read")
    parser.add_argument("--target", choices=list(HARDWARE), default="sm_90", help="the GPU whose tiles run")


def measure(shape: str, dtype: str, target: str) -> Iterator[Figure]:
    """Launches of a step of the head and of one pass, and the bytes of each operator."""
    problem = Problem(SHAPES[shape], dtype)
    for case in [Case(operator, pooling) for pooling in POOLINGS for operator in ("head", "revise_logits_one_pass")]:
        for contender in (OURS, EAGER):
            own, aten = count_launches(case, contender, problem, HARDWARE[target].target)
            place = "launches", f"{shape}, {dtype}, {target}", str(case), contender
            yield Figure(*place, "own kernels", "", own.total())
            yield Figure(*place, "all kernels", "", own.total() + aten.total())
    found = interpreted(count_traffic, problem, HARDWARE[target].target)
    for subject, values in moved_bytes(problem, found).items():
        for contender, value in values.items():
            yield Figure("traffic", f"{shape}, {dtype}, {target}", subject, contender, "moved", "B", value)


def count_launches(case: Case, contender: str, problem: Problem, target: Target) -> tuple[Counter[str], Counter[str]]:
    """What a step of a case launches on a target, by name: our own kernels, and ATen operations."""
    own, aten = Counter[str](), Counter[str]()
    for launches, operations in watch([case], contender, problem, target).values():
        own.update(launch.kernel.__name__ for launch in launches)
        aten.update(operation.name for operation in operations)
    return own, aten


def moved_bytes(problem: Problem, found: list[Traffic]) -> dict[str, dict[str, float]]:
    """Of each operator and direction, and of the head's step: at least, ours and the eager reference's."""
    beside, eager = (watch(problem.cases, contender, problem) for contender in (OURS, EAGER))
    values: dict[Place, dict[str, float]] = {}
    for (case, direction), (_, aten) in beside.items():
        mine = [one for one in found if one.operator == f"{case}, {direction}"]
        distinct = sum(one.distinct for one in mine if not one.is_scratch)
        scratch = sum(one.distinct for one in mine if one.is_scratch) + sum(operation.moved for operation in aten)
        values[case, direction] = {
            "at least": problem.work_of(case)[direction].bytes,
            "distinct": distinct,
            "scratch and matmuls": scratch,
            OURS: distinct + scratch,
            EAGER: sum(operation.moved for operation in eager[case, direction][1]),
        }
    return by_subject(values, problem.poolings)

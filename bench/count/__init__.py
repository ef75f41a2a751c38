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
from cge_kernels.tools.gpus import HARDWARE

MOST_OWN = 8  # what a step of the head may launch of our own kernels


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench count`."""
    parser.add_argument("--shape", choices=list(SHAPES), default="msmt17", help="B, C, H, W, n and N")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the map and the memory read")
    parser.add_argument("--target", choices=list(HARDWARE), default="sm_90", help="the GPU whose tiles run")
    parser.add_argument("--details", action="store_true", help="also launches by name and the bytes of each tensor")


def measure(shape: str, dtype: str, target: str, details: bool) -> Iterator[Figure]:
    """Launches and the bytes of each operator; with details, launches by name and the bytes of each tensor."""
    problem = Problem(SHAPES[shape], dtype)
    for case in [Case(operator, pooling) for pooling in POOLINGS for operator in ("head", "revise_logits_one_pass")]:
        yield from launch_figures(f"{shape}, {dtype}", case, problem, details)
    found = interpreted(count_traffic, problem, HARDWARE[target].target)
    yield from byte_figures(f"{shape}, {dtype}, {target}", problem, found)
    if details:
        yield from tensor_figures(f"{shape}, {dtype}, {target}", found)


def count_launches(case: Case, contender: str, problem: Problem) -> tuple[Counter[str], Counter[str]]:
    """What a step of a case launches, by name: our own kernels, and ATen operations."""
    own, aten = Counter[str](), Counter[str]()
    for launches, operations in watch([case], contender, problem).values():
        own.update(launch.kernel.__name__ for launch in launches)
        aten.update(operation.name for operation in operations)
    return own, aten


def launch_figures(setting: str, case: Case, problem: Problem, by_name: bool) -> Iterator[Figure]:
    """Our own kernels, all kernels and, if asked for, each by its name."""
    for contender in (OURS, EAGER):
        own, aten = count_launches(case, contender, problem)
        place = setting, str(case), contender
        yield Figure("launches", *place, "own kernels", "", own.total())
        yield Figure("launches", *place, "all kernels", "", own.total() + aten.total())
        for name, value in sorted((own | aten).items()) if by_name else ():
            yield Figure("launches by name", *place, name, "", value)


def byte_figures(setting: str, problem: Problem, found: list[Traffic]) -> Iterator[Figure]:
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
    for subject, parts in by_subject(values, problem.poolings).items():
        for contender, value in parts.items():
            yield Figure("traffic", setting, subject, contender, "moved", "B", value)


def tensor_figures(setting: str, found: list[Traffic]) -> Iterator[Figure]:
    """Of each tensor of each kernel: all accesses, and the distinct elements among them."""
    for one in (one for one in found if one.distinct):
        tensor = f"{one.tensor} (scratch)" if one.is_scratch else one.tensor
        place = "bytes of tensors", setting, f"{one.operator}: {one.kernel}: {tensor}", OURS
        for quantity in ("loaded", "distinct_loaded", "stored", "distinct_stored"):
            yield Figure(*place, quantity.replace("_", " "), "B", getattr(one, quantity))

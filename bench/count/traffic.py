"""Bytes that the operators load and store, counted element by element in Triton's interpreter.

Pooling, loss, revision and memory write run forward and backward, with tiles as for a named GPU. Every address that a
kernel loads, stores or changes atomically (tl.atomic_cas apart) counts, unless its lane is masked. All programs of a
kernel run, except those of the pooling kernels: each of these owns a part of one sample and does the same for every
sample, so some samples run, and their bytes are multiplied. Of a kernel with a grid-wide barrier, which programs one
after the other would never pass, a single program does all the work. Nothing is timed.

What is loaded again comes from L2 as far as it fits there; distinct elements come from memory once for each kernel.
Bytes are those of elements, not of the 32-byte sectors that a GPU moves. Of an operator:
- at least: its arguments read once and its results written once, by formula (bench/work.py);
- distinct: distinct elements of those same tensors, loaded and stored;
- scratch: distinct elements of what our kernels hand to one another (`SCRATCH`), and the bytes of the ATen operations
  beside them; in the loss's backward these are the library's matmuls, which read classifier and memory and write the
  gradients of classifier and features;
- eager: the same operator of cge_reference, as bench/count/operations.py counts the bytes of ATen operations.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import cge_kernels
from bench.cases import OURS, POOLINGS, Case, contenders
from bench.count.operations import Operation, Operations
from bench.measure import CPU, apart
from bench.shapes import DTYPES, Shape
from bench.work import Work, work
from cge_kernels import Launch, Target, launching
from cge_kernels.common.device_functions import INTERPRETED

OWN_ONE_SAMPLE = {"stripe_pool_kernel", "stripe_pool_backward_kernel"}  # programs, in the order of the samples
SCRATCH = {
    *("local_cast", "partial_sq_norms", "scores", "inv_norm", "grad_scores", "projection", "earlier", "grad_p"),
    *(
        "converted",
        "counter",
        "features_cast",
        "products",
        "saved_logits",
        "row_max",
        "argmax",
        "sums",
        "label_logit",
        "lse",
    ),
}


class Problem(NamedTuple):
    """What is counted.

    dtype: of the map and of the memory that revision reads; pool_samples: how many samples the pooling kernels run, the
    rest by multiplication.
    """

    shape: Shape
    dtype: str = "bfloat16"
    poolings: tuple[str, ...] = POOLINGS
    pool_samples: int = 1

    @property
    def cases(self) -> list[Case]:
        """The step's operators, in its order, but for the revision of given logits, after pooling and in one pass."""
        pools, one_pass = (
            [Case(operator, pooling) for pooling in self.poolings]
            for operator in ("stripe_pool", "revise_logits_one_pass")
        )
        return [*pools, Case("revised_cross_entropy"), Case("revise_logits"), *one_pass, Case("write_memory_")]

    def work_of(self, case: Case) -> dict[str, Work]:
        """What a case must move and compute, by direction."""
        return work(case.operator, self.shape, case.pooling or "average", DTYPES[self.dtype].itemsize)


Place = tuple[Case, str]  # a case and its direction


def by_subject(values: dict[Place, dict[str, float]], poolings: Sequence[str]) -> dict[str, dict[str, float]]:
    """The values by the name of their place, and their sums over the head's step with each pooling."""
    found = {f"{case}, {direction}": value for (case, direction), value in values.items()}
    for pooling in poolings:
        step = Counter[str]()
        for (case, _), value in values.items():
            in_step = not case.operator.startswith("revise_logits") and case.pooling in (None, pooling)
            step.update(value if in_step else {})
        found[f"head, {pooling}, step"] = step
    return found


def watch(
    cases: list[Case], contender: str, problem: Problem, target: Target | None = None
) -> dict[Place, tuple[list[Launch], list[Operation]]]:
    """By case and direction a contender's launches of our kernels, which do not run, and its ATen operations.

    So results are arbitrary, but no launch depends on them.
    """
    taken = {}

    def watched(place: Place, function: Callable[..., Any], *arguments: Any) -> Any:
        launches: list[Launch] = []
        with launching(launches.append, target), Operations() as operations:
            result = function(*arguments)
        taken[place] = launches, operations.found
        return result

    with cge_kernels.backend("triton"):
        for case in cases:
            one = contenders(case, problem.shape, DTYPES[problem.dtype], CPU, with_compiled=False)[contender]
            with launching(lambda launch: None):  # once before, so that the gradients that it starts from are there
                one.step()
            result = watched((case, "forward"), one.forward)
            if one.backward:
                watched((case, "backward"), one.backward, result)
    return taken


class Traffic(NamedTuple):
    """Bytes that one launch loads from and stores to one of its tensors: all, and those of distinct elements."""

    operator: str  # its case and direction
    launch: int  # its number in the step
    kernel: str
    tensor: str
    loaded: int
    distinct_loaded: int
    stored: int
    distinct_stored: int

    @property
    def distinct(self) -> int:
        """What memory must deliver and take."""
        return self.distinct_loaded + self.distinct_stored

    @property
    def is_scratch(self) -> bool:
        """Whether our kernels hand it to one another; the loss's grad_logits go to the library's matmuls."""
        return self.tensor in SCRATCH or (self.kernel, self.tensor) == ("grad_logits_kernel", "grad_logits")


class Accesses:
    """Which elements between a tensor's first and last one are loaded and stored, and how often in all."""

    def __init__(self, tensor: Tensor):
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.itemsize, self.first = tensor.itemsize, tensor.data_ptr()
        self.end = self.first + span * self.itemsize
        self.total = {"load": 0, "store": 0}
        self.touched = {direction: np.zeros(span, bool) for direction in self.total}

    def add(self, direction: str, addresses: np.ndarray) -> None:
        """Counts accesses to addresses between first and end."""
        self.total[direction] += addresses.size
        self.touched[direction][(addresses.astype(np.int64) - self.first) // self.itemsize] = True

    def bytes(self, direction: str, times: int) -> tuple[int, int]:
        """Of all accesses, and of the distinct elements, if as many more programs do the same to elements of their own.

        A single number is the same for all of them.
        """
        distinct = int(self.touched[direction].sum()) * (1 if self.touched[direction].size == 1 else times)
        return self.total[direction] * self.itemsize * times, distinct * self.itemsize


def run_counted(operator: str, number: int, launch: Launch, times: int) -> list[Traffic]:
    """What a launch loads from and stores to each of its tensors, seen in the interpreter.

    number: of the launch in the step; times: how many times the first programs, which are run, make the whole grid.

    Raises:
        RuntimeError: it touches an address outside of them.
    """
    name = launch.kernel.__name__
    programs = 1 if "launch_cooperative_grid" in launch.options else launch.grid[0] // times
    accesses = {key: Accesses(value) for key, value in launch.args.items() if isinstance(value, Tensor)}

    def record(directions: Sequence[str], pointer: Any, mask: Any) -> None:
        addresses = pointer.data[mask.data.astype(bool)]
        if not addresses.size:
            return
        lowest, highest = addresses.min(), addresses.max()
        touched = next((a for a in accesses.values() if a.first <= lowest and highest < a.end), None)
        if touched is None:
            raise RuntimeError(f"{name} touches an address outside of its tensors")
        for direction in directions:
            touched.add(direction, addresses)

    def before(method: str, action: Callable[..., None]) -> AbstractContextManager:
        """Patches a method of the interpreter to do something with its arguments first."""
        original = getattr(InterpreterBuilder, method)

        def patched(self, *args, **kwargs):
            action(*args)
            return original(self, *args, **kwargs)

        return patch.object(InterpreterBuilder, method, patched)

    with (
        before("create_masked_load", lambda pointer, mask, *_: record(["load"], pointer, mask)),
        before("create_masked_store", lambda pointer, _, mask, *__: record(["store"], pointer, mask)),
        before("create_atomic_rmw", lambda _, pointer, __, mask, *___: record(["load", "store"], pointer, mask)),
    ):
        replace(launch, grid=(programs,)).run()
    return [
        Traffic(operator, number, name, key.removesuffix("_ptr"), *a.bytes("load", times), *a.bytes("store", times))
        for key, a in accesses.items()
    ]


def count_traffic(problem: Problem, target: Target) -> list[Traffic]:
    """Traffic of our kernels with the target's tiles. Kernels must be interpreted in this process."""
    # What a launch reads may be anything: no address depends on it but for labels.
    taken = watch(problem.cases, OURS, problem, target)
    found: list[Traffic] = []
    for number, (place, launch) in enumerate((place, launch) for place, (some, _) in taken.items() for launch in some):
        print(f"counting {', '.join(map(str, place))}: {launch.kernel.__name__}", file=sys.stderr)
        is_alike = launch.kernel.__name__ in OWN_ONE_SAMPLE
        times = problem.shape.batch // problem.pool_samples if is_alike else 1
        found += run_counted(", ".join(map(str, place)), number, launch, times)
    return found


def interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result where kernels are interpreted: here, or else in a new process."""
    return function(*arguments) if INTERPRETED.value else apart(function, *arguments, TRITON_INTERPRET="1")

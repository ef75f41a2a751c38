"""Bytes that the operators load and store, counted element by element: python -m bench.traffic --help

The operators run at the given shape (by default the paper's): stripe_pool, revised_cross_entropy and revise_logits
forward and backward, and write_memory_. The map, the memory that is multiplied and the gradient of the map have the
chosen dtype; pooled features, classifier, logits and the written memory are float32; for a smaller dtype the write
refreshes a shadow too. The kernels run in Triton's interpreter, with tiles as for the GPU that `--target` names, and
every address that they load, store or change atomically (tl.atomic_cas apart) counts, unless its lane is masked.
Nothing is timed.

All programs of a kernel run, except those of the pooling kernels: each of these owns a part of one sample and does the
same for every sample, so `--pool_samples` of them run, and their bytes are multiplied.

First table: each kernel and tensor, bytes of all accesses and of the distinct elements among them, and what part of the
programs was run. What is loaded again comes from L2 as far as it fits there; distinct elements come from memory once
for each kernel.

Second table: each operator, over its kernels; the step is the head's, so without revise_logits.
- compulsory: its arguments read once and its results written once, by formula (`compulsory`).
- distinct: distinct elements of those same tensors, loaded and stored, and as a ratio to compulsory.
- scratch: distinct elements of what our kernels hand to one another (`SCRATCH`), and the bytes of the ATen operations
  beside them; in the loss's backward these are the library's matmuls, which read classifier and memory and write the
  gradients of classifier and features.
- eager: the same operator of cge_reference, as bench/operations.py counts the bytes of ATen operations, and as a ratio
  to distinct + scratch.
Bytes are those of elements, not of the 32-byte sectors that a GPU moves.

`--json` prints the rows of the first table alone, each with the number of its launch.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from triton.runtime.interpreter import InterpreterBuilder

import cge_kernels
import cge_reference
from bench.operations import Operations
from bench.shapes import Shape
from bench.tables import table
from bench.work import INSTANCES, Work, work
from cge_fast import errors
from cge_fast.errors import UserError
from cge_kernels.common.device_functions import INTERPRETED
from cge_kernels.tools.gpus import HARDWARE

PROGRAM = "bench.traffic"
OWN_ONE_SAMPLE = {"stripe_pool_kernel", "stripe_pool_backward_kernel"}  # programs, in the order of the samples
SCRATCH = {
    *("operand", "squares", "scores", "scale", "grad_scores", "projection", "earlier", "grad_p"),
    *("feature_operand", "kept", "highest", "winner", "sums", "target", "log_sum", "gradients"),
}
STEP = ("pool forward", "pool backward", "loss forward", "loss backward", "memory write")


@dataclass(frozen=True)
class Problem:
    """What the step is run on.

    Args:
        batch: B, samples.
        channels: C of the feature map.
        height: H of the feature map.
        width: W of the feature map.
        stripes: n, at most the height.
        classes: N, identities in the memory.
        dtype: of the map and of the memory that revision reads.
        pooling: average or generalised mean.
        channels_last: the map's memory format.
        pool_samples: how many samples the pooling kernels run; the rest by multiplication.
    """

    batch: PositiveInt = 64
    channels: PositiveInt = 2048
    height: PositiveInt = 24
    width: PositiveInt = 8
    stripes: PositiveInt = 3
    classes: PositiveInt = 1041
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    pooling: Literal["average", "gem"] = "gem"
    channels_last: bool = False
    pool_samples: PositiveInt = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return getattr(torch, self.dtype)

    @property
    def labels(self) -> Tensor:
        """(B,) labels, several samples of each identity."""
        return torch.arange(self.batch) // INSTANCES % self.classes


def compulsory(problem: Problem) -> dict[str, Work]:
    """What each operator must move and compute, as bench/work.py says."""
    shape = Shape(problem.batch, problem.channels, problem.height, problem.width, problem.stripes, problem.classes)
    needed = {
        operator: work(operator, shape, problem.pooling, problem.torch_dtype.itemsize)
        for operator in ("stripe_pool", "revised_cross_entropy", "revise_logits", "write_memory_")
    }
    return {
        "pool forward": needed["stripe_pool"]["forward"],
        "pool backward": needed["stripe_pool"]["backward"],
        "loss forward": needed["revised_cross_entropy"]["forward"],
        "loss backward": needed["revised_cross_entropy"]["backward"],
        "revise forward": needed["revise_logits"]["forward"],
        "revise backward": needed["revise_logits"]["backward"],
        "memory write": needed["write_memory_"]["forward"],
    }


def step(package: Any, problem: Problem, operator: Callable[[str], AbstractContextManager]) -> None:
    """Runs a package's operators one after the other, each inside `operator(name)`."""
    random = torch.Generator().manual_seed(0)
    b, c, n, k = problem.batch, problem.channels, problem.stripes, problem.classes

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=random)

    memory_format = torch.channels_last if problem.channels_last else torch.contiguous_format
    feature_map = draw(b, c, problem.height, problem.width).to(problem.torch_dtype, memory_format=memory_format)
    p = torch.tensor(3.0) if problem.pooling == "gem" else None
    learnt = [tensor.requires_grad_() for tensor in (feature_map, p) if tensor is not None]
    memory = normalize(draw(n, k, c), dim=2)
    shadow = None if problem.dtype == "float32" else memory.to(problem.torch_dtype)
    local, logits = draw(b, n, c).requires_grad_(), draw(b, k).requires_grad_()
    features_and_weight = draw(b, c).requires_grad_(), draw(k, c).requires_grad_()
    grad_global, grad_local, grad_revised, grad_loss = draw(b, c), draw(b, n, c), draw(b, k), draw(b)
    labels, read = problem.labels, memory if shadow is None else shadow
    with operator("pool forward"):
        features = package.stripe_pool(feature_map, n, p)
    with operator("pool backward"):
        torch.autograd.grad(features, learnt, (grad_global, grad_local))
    with operator("loss forward"):
        loss, _, _ = package.revised_cross_entropy(*features_and_weight, local, read, labels)
    with operator("loss backward"):
        torch.autograd.grad(loss, (*features_and_weight, local), grad_loss)
    with operator("revise forward"):
        revised = package.revise_logits(logits, local, read)
    with operator("revise backward"):
        torch.autograd.grad(revised, (logits, local), grad_revised)
    with operator("memory write"):
        package.write_memory_(memory, local.detach(), labels, 0.5, shadow)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one launch loads from and stores to one of its tensors: all, and those of distinct elements."""

    operator: str
    launch: int  # its number in the step
    kernel: str
    tensor: str
    loaded: int
    distinct_loaded: int
    stored: int
    distinct_stored: int
    run: str  # what part of the programs

    @property
    def distinct(self) -> int:
        """What memory must deliver and take."""
        return self.distinct_loaded + self.distinct_stored


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
        distinct = int(self.touched[direction].sum())
        all_distinct = distinct if self.touched[direction].size == 1 else distinct * times
        return self.total[direction] * self.itemsize * times, all_distinct * self.itemsize


def run_counted(operator: str, number: int, launch: cge_kernels.Launch, times: int) -> list[Traffic]:
    """What a launch loads from and stores to each of its tensors, seen in the interpreter.

    number: of the launch in the step; times: how many times the first programs, which are run, make the whole grid.

    Raises:
        RuntimeError: it touches an address outside of them.
    """
    name = launch.kernel.__name__
    programs = launch.grid[0] // times
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
        tqdm(total=programs, desc=f"{operator}: {name}", unit=" program", leave=False) as bar,
        before("set_grid_idx", lambda *_: bar.update()),
        before("create_masked_load", lambda pointer, mask, *_: record(["load"], pointer, mask)),
        before("create_masked_store", lambda pointer, _, mask, *__: record(["store"], pointer, mask)),
        before("create_atomic_rmw", lambda _, pointer, __, mask, *___: record(["load", "store"], pointer, mask)),
    ):
        replace(launch, grid=(programs,)).run()
    run = "all" if times == 1 else f"1/{times}"
    return [
        Traffic(
            operator,
            number,
            name,
            key.removesuffix("_pointer"),
            *access.bytes("load", times),
            *access.bytes("store", times),
            run,
        )
        for key, access in accesses.items()
    ]


def measure_project(problem: Problem, target: cge_kernels.Target) -> tuple[list[Traffic], dict[str, int]]:
    """Traffic of our kernels with the target's tiles, and for each operator the bytes of the ATen operations beside."""
    found: list[Traffic] = []
    numbers = count()
    beside: dict[str, int] = {}

    @contextmanager
    def operator(name: str) -> Iterator[None]:
        launches: list[cge_kernels.Launch] = []
        with cge_kernels.launching(launches.append, target), Operations() as operations:
            yield
        # Only now, so that what the interpreter does to tensors is not counted. Nothing between depends on the results.
        for launch in launches:
            is_alike = launch.kernel.__name__ in OWN_ONE_SAMPLE
            times = problem.batch // problem.pool_samples if is_alike else 1
            found.extend(run_counted(name, next(numbers), launch, times))
        beside[name] = sum(operation.moved for operation in operations.found)

    with cge_kernels.backend("triton"):
        step(cge_kernels, problem, operator)
    return found, beside


def measure_eager(problem: Problem) -> dict[str, int]:
    """Bytes that each operator of cge_reference moves."""
    moved: dict[str, int] = {}

    @contextmanager
    def operator(name: str) -> Iterator[None]:
        with Operations() as operations:
            yield
        moved[name] = sum(operation.moved for operation in operations.found)

    step(cge_reference, problem, operator)
    return moved


def factor(part: int, whole: int) -> str:
    """part / whole, or nothing where nothing was done."""
    return f"{part / whole:.2f}" if whole else ""


def tensor_rows(found: list[Traffic]) -> list[tuple[str | int, ...]]:
    """Rows of the first table."""
    return [
        (
            *(t.operator, t.kernel, t.tensor + (" (scratch)" if t.tensor in SCRATCH else "")),
            *(t.loaded, t.distinct_loaded, factor(t.loaded, t.distinct_loaded)),
            *(t.stored, t.distinct_stored, factor(t.stored, t.distinct_stored), t.run),
        )
        for t in found
        if t.distinct
    ]


def operator_rows(
    needed: dict[str, Work], found: list[Traffic], beside: dict[str, int], eager: dict[str, int]
) -> list[tuple[str | int, ...]]:
    """Rows of the second table; the last is the whole step."""
    rows = []
    for operators in [*([name] for name in needed), STEP]:
        least = sum(needed[name].bytes for name in operators)
        other, plain = (sum(figures[name] for name in operators) for figures in (beside, eager))
        mine = [t for t in found if t.operator in operators]
        distinct = sum(t.distinct for t in mine if t.tensor not in SCRATCH)
        scratch = other + sum(t.distinct for t in mine if t.tensor in SCRATCH)
        name = operators[0] if len(operators) == 1 else "step"
        ratios = f"{distinct / least:.3f}", f"{plain / (distinct + scratch):.2f}"
        rows.append((name, least, distinct, ratios[0], scratch, plain, ratios[1]))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's. TRITON_INTERPRET must have been 1 at import."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Counts the bytes that each of our kernels loads and stores in one training step, by running them "
        "in Triton's interpreter, beside what the operators must move and what plain PyTorch moves. At the paper's "
        "shape, the default, it takes a minute or two.",
        exit_on_error=False,
    )
    parser.add_class_arguments(Problem)
    parser.add_argument("--target", choices=list(HARDWARE), default="sm_90", help="the GPU whose tiles run")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--json", action="store_true", help="the first table's rows as JSON, and nothing else")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    problem = Problem(**{field.name: options[field.name] for field in fields(Problem)})
    if problem.stripes > problem.height:
        raise UserError(f"stripes: must be at most the height {problem.height}, got {problem.stripes}")
    if problem.batch % problem.pool_samples:
        raise UserError(f"pool_samples: must divide the batch {problem.batch}, got {problem.pool_samples}")
    found, beside = measure_project(problem, HARDWARE[options.target].target)
    if options.json:
        print(json.dumps([asdict(traffic) for traffic in found], indent=1))
        return
    print(f"Bytes, counted in Triton's interpreter with the tiles of {options.target}: {problem}\n")
    header = ("operator", "kernel", "tensor", "loaded", "distinct", "factor", "stored", "distinct", "factor", "run")
    print(table(header, tensor_rows(found), options.markdown), end="\n\n")
    header = (
        "operator",
        "compulsory",
        "distinct",
        "distinct/compulsory",
        "scratch",
        "eager",
        "eager/(distinct+scratch)",
    )
    rows = operator_rows(compulsory(problem), found, beside, measure_eager(problem))
    print(table(header, rows, options.markdown))


if __name__ == "__main__":
    if not INTERPRETED.value:  # Triton looks at the variable when kernels are decorated
        os.execve(
            sys.executable, [sys.executable, "-m", PROGRAM, *sys.argv[1:]], {**os.environ, "TRITON_INTERPRET": "1"}
        )
    errors.run(main, PROGRAM)

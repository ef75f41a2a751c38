"""What is compared: every operator and the whole head, as kernels, as cge_reference and as cge_reference compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._pytree import tree_leaves

import cge_kernels
from bench.measure import Contender
from bench.shapes import Shape
from bench.work import INSTANCES
from cge_fast import CGEHead

OURS, EAGER, COMPILED = CONTENDERS = ["cge_kernels", "eager", "torch.compile"]  # the latter two run cge_reference
POOLINGS = ("average", "gem")
MOMENTUM = 0.5


@dataclass(frozen=True)
class Case:
    """An operator, or "head", and the pooling of those that pool."""

    operator: str
    pooling: str | None = None

    def __str__(self) -> str:
        return f"{self.operator}, {self.pooling}" if self.pooling else self.operator


CASES = [
    *(Case("stripe_pool", pooling) for pooling in POOLINGS),
    Case("revise_logits"),
    *(Case("revise_logits_one_pass", pooling) for pooling in POOLINGS),
    Case("revised_cross_entropy"),
    Case("write_memory_"),
    *(Case("head", pooling) for pooling in POOLINGS),
]


def contenders(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, with_compiled: bool = True
) -> dict[str, Contender]:
    """This project, cge_reference eager and, unless it is left out, cge_reference under torch.compile.

    They share their arguments. A backward starts from ones for every result that has a gradient, and ends at what
    requires one; the head's is that of its loss, and then writes the memory. dtype: of the feature map and of the
    memory that is multiplied; everything else is float32.
    """
    torch._dynamo.reset()  # else the limit of recompilations would end it after a few shapes
    taken = arguments(case, shape, dtype, device)
    function: Callable = (
        head(case, shape, dtype, device) if case.operator == "head" else getattr(cge_kernels, case.operator)
    )
    parameters = function.parameters() if case.operator == "head" else ()
    learnt = [leaf for leaf in (*taken, *parameters) if isinstance(leaf, Tensor) and leaf.requires_grad]
    ways: dict[str, Callable] = {OURS: lambda function: function, EAGER: under_reference}
    if with_compiled:
        ways[COMPILED] = lambda function: under_reference(torch.compile(function, dynamic=False))

    def contender(way: Callable) -> Contender:
        write = way(function.write_memory) if case.operator == "head" else None

        def backward(result: Any) -> tuple[Tensor, ...]:
            if write:
                gradients = torch.autograd.grad(result.loss, learnt)
                write(result.stripes, taken[1], MOMENTUM)
                return gradients
            outputs = [output for output in tree_leaves(result) if output.requires_grad]
            return torch.autograd.grad(outputs, learnt, [ones(output.shape, output.device) for output in outputs])

        return Contender(partial(way(function), *taken), backward if learnt else None, device)

    return {name: contender(way) for name, way in ways.items()}


def under_reference(function: Callable) -> Callable:
    """The function with the operators of cge_reference."""

    def call(*taken: Any) -> Any:
        with cge_kernels.backend("reference"):
            return function(*taken)

    return call


@cache
def ones(shape: torch.Size, device: torch.device) -> Tensor:
    """A gradient that does not count as time or memory of what is measured."""
    return torch.ones(shape, device=device)


def arguments(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of a case: like features that were pooled after a ReLU, none is negative."""
    b, c, n, k = shape.batch, shape.channels, shape.stripes, shape.classes
    learnt = partial(torch.rand, device=device, requires_grad=True)
    labels = torch.arange(b, device=device) // INSTANCES % k

    def feature_map() -> Tensor:
        return torch.randn(b, c, shape.height, shape.width, device=device).relu_().to(dtype).requires_grad_()

    def memory() -> Tensor:
        return normalize(torch.rand(n, k, c, device=device), dim=2)

    p = torch.tensor(3.0, device=device, requires_grad=True) if case.pooling == "gem" else None
    match case.operator:
        case "stripe_pool":
            return feature_map(), n, p
        case "revise_logits":
            return learnt(b, k), learnt(b, n, c), memory().to(dtype)
        case "revise_logits_one_pass":
            return feature_map(), learnt(b, k), memory().to(dtype), p
        case "revised_cross_entropy":
            return learnt(b, c), learnt(k, c), learnt(b, n, c), memory().to(dtype), labels
        case "write_memory_":
            master = memory()
            low_precision_memory = None if dtype == torch.float32 else master.to(dtype)
            return master, torch.rand(b, n, c, device=device), labels, MOMENTUM, low_precision_memory
        case "head":
            return feature_map(), labels
    raise ValueError(f"operator must be one of cge_kernels' or 'head', got {case.operator!r}")


def head(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> CGEHead:
    """A head whose memory is filled; for a 16-bit dtype it reads a copy of the memory in it, as a training does."""
    memory_dtype = None if dtype == torch.float32 else dtype
    made = CGEHead(shape.channels, shape.classes, shape.stripes, case.pooling == "gem", memory_dtype=memory_dtype)
    filled = normalize(torch.rand_like(made.loss.memory), dim=2)
    made.load_state_dict(made.state_dict() | {"loss.memory": filled})
    return made.to(device)

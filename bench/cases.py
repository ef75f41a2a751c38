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

OURS, EAGER, COMPILED = "cge_kernels", "eager", "torch.compile"  # the latter two run cge_reference
BACKENDS = {OURS: "auto", EAGER: "reference"}
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
    Case("stripe_pool", "average"),
    Case("stripe_pool", "gem"),
    Case("revise_logits"),
    Case("revise_logits_one_pass", "average"),
    Case("revise_logits_one_pass", "gem"),
    Case("revised_cross_entropy"),
    Case("write_memory_"),
    Case("head", "average"),
    Case("head", "gem"),
]


def contenders(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, with_compiled: bool = True, **layout: Any
) -> dict[str, Contender]:
    """This project, cge_reference eager and, unless it is left out, cge_reference under torch.compile.

    They share their arguments. dtype: of the feature map and of the memory that is multiplied; everything else is
    float32. layout: the feature map's memory_format.
    """
    torch._dynamo.reset()  # else the limit of recompilations would end it after a few shapes
    taken, parameters = arguments(case, shape, dtype, device, **layout), []
    function: Callable = getattr(cge_kernels, case.operator, None)
    if case.operator == "head":
        made = head(case, shape, device)
        function, parameters = partial(loss, made), list(made.parameters())
    functions = {OURS: function, EAGER: under_reference(function)}
    if with_compiled:
        functions[COMPILED] = under_reference(torch.compile(function, dynamic=False))
    return {name: contender(partial(function, *taken), [*taken, *parameters]) for name, function in functions.items()}


def under_reference(function: Callable) -> Callable:
    """The function with the operators of cge_reference."""

    def call(*taken: Any) -> Any:
        with cge_kernels.backend("reference"):
            return function(*taken)

    return call


def arguments(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Any, ...]:
    """Random arguments of a case: like features that were pooled after a ReLU, none is negative."""
    b, c, n, k = shape.batch, shape.channels, shape.stripes, shape.classes
    learnt = partial(torch.rand, device=device, requires_grad=True)
    labels = torch.arange(b, device=device) // INSTANCES % k

    def feature_map() -> Tensor:
        activations = torch.randn(b, c, shape.height, shape.width, device=device).relu_()
        return activations.to(dtype, memory_format=memory_format).requires_grad_()

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


def head(case: Case, shape: Shape, device: torch.device) -> CGEHead:
    """A head whose memory is filled."""
    made = CGEHead(shape.channels, shape.classes, shape.stripes, gem=case.pooling == "gem").to(device)
    made.loss.memory.copy_(normalize(torch.rand_like(made.loss.memory), dim=2))
    return made


def loss(module: Callable[..., Any], feature_map: Tensor, labels: Tensor) -> Tensor:
    """A head's loss."""
    return module(feature_map, labels).loss


def contender(forward: Callable[[], Any], taken: list[Any]) -> Contender:
    """Its backward starts from ones for every result that has a gradient, and ends at what requires one."""
    learnt = [argument for argument in taken if isinstance(argument, Tensor) and argument.requires_grad]
    if not learnt:
        return Contender(forward)

    def backward(result: Any) -> None:
        outputs = [output for output in tree_leaves(result) if output.requires_grad]
        torch.autograd.grad(outputs, learnt, [ones(output.shape, output.device) for output in outputs])

    return Contender(forward, backward)


@cache
def ones(shape: torch.Size, device: torch.device) -> Tensor:
    """A gradient that does not count as time or memory of what is measured."""
    return torch.ones(shape, device=device)

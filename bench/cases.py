"""What is compared: every operator and the whole head, of this project and of cge_reference, eager and compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._pytree import tree_leaves

import cge_kernels
import cge_reference
from bench.compiler import missing_compiler
from bench.measure import Contender, Times, take_turns
from bench.shapes import Shape
from bench.work import INSTANCES
from cge_fast.losses.cge import CGEHead

OURS, EAGER, COMPILED = "cge_kernels", "eager", "torch.compile"  # the latter two run cge_reference
EPOCHS = 120
ALPHA = 0.5


@dataclass(frozen=True)
class Case:
    """An operator, or "head", and the pooling of those that pool."""

    operator: str
    pooling: str | None = None

    @property
    def has_backward(self) -> bool:
        """All but the memory's write have one."""
        return self.operator != "write_memory_"

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


class Inputs:
    """Random arguments of a shape, each made when it is first asked for.

    dtype: of the feature map and of the memory that is multiplied; everything else is float32.
    """

    def __init__(self, case: Case, shape: Shape, dtype: torch.dtype, device: torch.device):
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device

    def draw(self, *size: int) -> Tensor:
        """Between 0 and 1: positive, like features that were pooled after a ReLU."""
        return torch.rand(size, device=self.device)

    @cached_property
    def feature_map(self) -> Tensor:
        s = self.shape
        activations = torch.randn(s.batch, s.channels, s.height, s.width, device=self.device).relu_()
        return activations.to(self.dtype).requires_grad_()

    @cached_property
    def p(self) -> Tensor | None:
        return torch.tensor(3.0, device=self.device, requires_grad=True) if self.case.pooling == "gem" else None

    @cached_property
    def local_features(self) -> Tensor:
        return self.draw(self.shape.batch, self.shape.stripes, self.shape.channels).requires_grad_()

    @cached_property
    def logits(self) -> Tensor:
        return self.draw(self.shape.batch, self.shape.classes).requires_grad_()

    @cached_property
    def features(self) -> Tensor:
        return self.draw(self.shape.batch, self.shape.channels).requires_grad_()

    @cached_property
    def weight(self) -> Tensor:
        return self.draw(self.shape.classes, self.shape.channels).requires_grad_()

    @cached_property
    def master(self) -> Tensor:
        return normalize(self.draw(self.shape.stripes, self.shape.classes, self.shape.channels), dim=2)

    @cached_property
    def memory(self) -> Tensor:
        return self.master.to(self.dtype)

    @cached_property
    def shadow(self) -> Tensor | None:
        return None if self.dtype == torch.float32 else self.master.to(self.dtype)

    @cached_property
    def labels(self) -> Tensor:
        return torch.arange(self.shape.batch, device=self.device) // INSTANCES % self.shape.classes


def compare(
    case: Case, shape: Shape, dtype: torch.dtype, rounds: int, seconds: float, only: str | None = None
) -> dict[str, dict[str, Times]]:
    """Times by contender and direction, on the GPU if there is one; of all contenders, or of one alone."""
    device = default_device()
    compared = contenders(case, shape, dtype, device, not missing_compiler())
    return take_turns({only: compared[only]} if only else compared, device, rounds, seconds)


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def contenders(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, with_compiled: bool = True
) -> dict[str, Contender]:
    """This project, cge_reference eager and, unless it is left out, cge_reference under torch.compile.

    They share their arguments.
    """
    torch._dynamo.reset()  # else the limit of recompilations would end it after a few shapes
    inputs = Inputs(case, shape, dtype, device)
    functions: dict[str, Callable[..., Any]]
    if case.operator == "head":
        heads = {name: head(kernels, inputs) for name, kernels in ((OURS, "fused"), (EAGER, "reference"))}
        functions = {name: partial(loss, heads[name]) for name in heads}
        parameters = {name: list(heads[name].parameters()) for name in heads}
        arguments = (inputs.feature_map, inputs.labels)
    else:
        functions = {OURS: partial(call, cge_kernels, case), EAGER: partial(call, cge_reference, case)}
        parameters = {name: [] for name in functions}
        arguments = arguments_of(case, inputs)
    if with_compiled:
        functions[COMPILED] = torch.compile(functions[EAGER], dynamic=False)
        parameters[COMPILED] = parameters[EAGER]
    learnt = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]
    return {
        name: contender(partial(function, *arguments), learnt + [p for p in parameters[name] if p.requires_grad])
        for name, function in functions.items()
    }


def arguments_of(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """What an operator takes, without settings that are the same for all; `call` hands them on."""
    match case.operator:
        case "stripe_pool":
            return inputs.feature_map, inputs.shape.stripes, inputs.p
        case "revise_logits":
            return inputs.logits, inputs.local_features, inputs.memory
        case "revise_logits_one_pass":
            return inputs.feature_map, inputs.logits, inputs.memory, inputs.p
        case "revised_cross_entropy":
            return inputs.features, inputs.weight, inputs.local_features, inputs.memory, inputs.labels
        case "write_memory_":
            return inputs.master, inputs.local_features.detach(), inputs.labels, ALPHA, inputs.shadow
    raise ValueError(f"operator must be one of cge_kernels', got {case.operator!r}")


def call(package: ModuleType, case: Case, *arguments: Any) -> Any:
    """An operator of a package."""
    return getattr(package, case.operator)(*arguments)


def head(kernels: str, inputs: Inputs) -> CGEHead:
    """A head whose memory is filled."""
    s = inputs.shape
    made = CGEHead(s.channels, s.classes, EPOCHS, s.stripes, inputs.case.pooling, kernels=kernels).to(inputs.device)
    made.memory.copy_(inputs.master)
    return made


def loss(module: Callable[..., Any], feature_map: Tensor, labels: Tensor) -> Tensor:
    """A head's loss."""
    return module(feature_map, labels).loss


def contender(forward: Callable[[], Any], learnt: list[Tensor]) -> Contender:
    """Its backward starts from ones for every result that has a gradient."""
    if not learnt:
        return Contender(forward)

    def backward(result: Any) -> None:
        outputs = [output for output in tree_leaves(result) if output.requires_grad]
        torch.autograd.grad(outputs, learnt, [ones(output.shape, output.device) for output in outputs])

    return Contender(forward, backward)


@lru_cache(maxsize=4)
def ones(shape: torch.Size, device: torch.device) -> Tensor:
    """A gradient that does not count as time or memory of what is measured."""
    return torch.ones(shape, device=device)

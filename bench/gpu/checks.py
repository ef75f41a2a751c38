"""What is checked on a GPU: parity, and of the head's step equal bits, CUDA graphs, synchronisation and host time."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

import cge_kernels
from bench import cases
from bench.cases import MOMENTUM, OURS, POOLINGS, Case
from bench.measure import CPU, host_seconds, take_turns
from bench.results import Figure
from bench.shapes import SHAPES, Shape
from cge_fast.errors import one_line

BACKENDS = {OURS: "triton", "reference": "reference"}
PRECISIONS = {  # dtype of map and memory, and torch's float32 matmul precision
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}
BEFORE_CAPTURE = 3  # steps
MOST_OF_EAGER = 0.3  # host time of a step; with the null driver, repeated by itself, it takes that


@dataclass(frozen=True)
class Expectation:
    """What should hold and whether it does; None: it could not be tried here."""

    what: str
    holds: bool | None
    detail: str = ""

    @classmethod
    def after(cls, what: str, error: Exception, holds: bool | None = False) -> "Expectation":
        """One that an error has ended."""
        return cls(what, holds, f"{type(error).__name__}: {one_line(error)}")

    @classmethod
    def runs(cls, what: str, function: Callable[..., Any], *arguments: Any) -> "Expectation":
        """That a function raises nothing."""
        try:
            function(*arguments)
        except torch.AcceleratorError as error:  # whatever comes after it on this GPU fails, too
            raise RuntimeError(f"{what}: {one_line(error)}") from error
        except Exception as error:
            return cls.after(what, error)
        return cls(what, True)


Item = Figure | Expectation


class Place(NamedTuple):
    """Where and how large. Without a GPU kernels are interpreted, and no time is judged."""

    device: torch.device
    setting: str
    shape: Shape
    rounds: int
    ways: tuple[str, ...]  # to run a step

    @property
    def is_dry(self) -> bool:
        """Whether there is no GPU."""
        return self.device.type == "cpu"


def place(dry: bool) -> Place:
    """The GPU and the paper's shape, or the CPU and a tiny one."""
    if dry:
        return Place(CPU, "tiny", SHAPES["tiny"], 1, ("eager", "graph"))
    return Place(torch.device("cuda"), "msmt17", SHAPES["msmt17"], 30, ("eager", "graph", "compiled"))


def parity(at: Place) -> Iterator[Item]:
    """Every operator and gradient within the budget of tests/error_budget.py, with the truth in float64."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    budget, write_budget, support = map(import_module, ("error_budget", "write_budget", "support"))
    tiny, papers = (5, 3, 19, 37, 7, 3), (64, 3, 1041, 2048, 24, 8)
    streamed = 64, 2, 16_000, 64, 4, 2  # more classes than the split kernels take; "0": and nothing is kept of them
    tried = [(tiny, "256"), (papers, "256"), (streamed, "256"), (streamed, "0")]
    for sizes, scratch in [((4, 2, 7, 5, 5, 2), "256")] if at.is_dry else tried:
        setting = f"{sizes}, {scratch} MiB of scratch"
        sample = support.draw_sample(*sizes)
        p, local = torch.tensor(3.0, device=at.device), {"local_features": sample.local_features}
        weight = sample.weight / sizes[3] ** 0.5  # logits of about 1, so that rounded ones stay within their budget
        for precision, (dtype, matmul) in PRECISIONS.items():
            torch.set_float32_matmul_precision(matmul)
            feature_map, memory = {"feature_map": sample.feature_map.sigmoid().to(dtype)}, sample.memory.to(dtype)
            revised = {"logits": sample.logits, "memory": memory}
            loss = {"features": sample.features, "weight": weight, "memory": memory, "labels": sample.labels}
            calls: dict[str, dict[str, Any]] = {
                "stripe_pool, average": feature_map | {"stripes": sizes[1], "p": None},
                "stripe_pool, gem": feature_map | {"stripes": sizes[1], "p": p},
                "revise_logits": revised | local,
                "revise_logits_one_pass, average": feature_map | revised | {"p": None},
                "revise_logits_one_pass, gem": feature_map | revised | {"p": p},
                "revised_cross_entropy": loss | local,
            }
            # Rounded operands may change which of two near classes is the highest.
            skip = () if precision == "fp32" else ("correct", "stripe_correct")
            for name, arguments in calls.items():
                check = partial(budget.check_parity, name.split(",")[0], arguments, "triton", skip=skip)
                yield Expectation.runs(f"parity of {name}, {precision}, {setting}", within, scratch, check)
            written = sample.memory.clone(), sample.local_features.to(dtype), sample.labels, 0.3, "triton"
            what = f"parity of write_memory_, {precision}, {setting}"
            yield Expectation.runs(what, within, scratch, write_budget.check_write, *written, memory.clone())


def within(scratch: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls the function with so many mebibytes of scratch."""
    with patch.dict(os.environ, CGE_SCRATCH_MB=scratch):
        function(*arguments)


class Step:
    """A step of the head from a given start: forward, backward and the memory's write.

    inputs: a feature map, by default a random one in bfloat16; or, with a network, its images. Then the step is that of
    the whole, with Adam. way: "eager", "compiled", or as a CUDA "graph", which leaves out the reference's write, since
    that synchronises.
    """

    def __init__(
        self, at: Place, contender: str, pooling: str = "gem", way: str = "eager", network: nn.Module | None = None,
        inputs: Tensor | None = None,
    ):  # fmt: skip
        torch.manual_seed(0)
        case = Case("head", pooling)
        self.at, self.backend, self.network, self.optimizer = at, BACKENDS[contender], network, None
        self.head = cases.head(case, at.shape, torch.bfloat16, at.device)
        drawn, self.labels = cases.arguments(case, at.shape, torch.bfloat16, at.device)
        self.inputs = drawn if inputs is None else inputs
        parameters = [one for one in self.head.parameters() if one.requires_grad]
        self.learnt = [*(network.parameters() if network else [drawn]), *parameters]
        if network:
            self.optimizer = torch.optim.Adam(self.learnt, fused=True, capturable=not at.is_dry)
        self.forward = torch.compile(self.head, dynamic=False) if way == "compiled" else self.head
        self.differentiated, self.run = self.differentiate, self.eager
        with cge_kernels.backend(self.backend):
            if way == "graph" and contender == OURS:
                self.run = capture(self.eager, at)
            elif way == "graph":
                self.differentiated = capture(self.differentiate, at)

    def differentiate(self) -> tuple[Any, tuple[Tensor, ...]]:
        """The head's output and the gradients; the network, if there is one, has learnt from them."""
        feature_map = self.inputs
        if self.network:
            with torch.autocast(self.at.device.type, torch.bfloat16, cache_enabled=False):
                feature_map = self.network(self.inputs)
        output = self.forward(feature_map, self.labels)
        gradients = torch.autograd.grad(output.loss, self.learnt)
        if self.optimizer:
            for parameter, gradient in zip(self.learnt, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
        return output, gradients

    def eager(self) -> list[Tensor]:
        """Loss and gradients."""
        with cge_kernels.backend(self.backend):
            output, gradients = self.differentiated()
            self.head.write_memory(output.stripes, self.labels, MOMENTUM)
        return [output.loss, *gradients]


def capture(function: Callable[[], Any], at: Place) -> Callable[[], Any]:
    """The function as a CUDA graph, after some calls; without a GPU the function itself, after as many."""
    stream = None if at.is_dry else torch.cuda.Stream()
    if stream:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(BEFORE_CAPTURE):
            function()
    if not stream:
        return function
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def steps(at: Place) -> Iterator[Item]:
    """The head's step: the same bits from run to run and as a CUDA graph, no synchronisation, and its host time."""

    def bits(pooling: str, way: str) -> list[Tensor]:
        step = Step(at, OURS, pooling, way)
        for _ in range(0 if way == "graph" else BEFORE_CAPTURE):
            step.run()
        return [tensor.clone() for tensor in (*step.run(), step.head.loss.memory)]

    def compare(one: list[Tensor], pooling: str, way: str) -> None:
        pairs = enumerate(zip(one, bits(pooling, way), strict=True))
        differing = [number for number, pair in pairs if not torch.equal(*pair)]
        assert not differing, f"of loss, gradients and memory those at {differing} differ"

    def run_without_synchronising(step: Step) -> None:
        step.run()
        if at.is_dry:
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for pooling in POOLINGS:
        one = bits(pooling, "eager")
        yield Expectation.runs(f"the same bits from run to run, {pooling}", compare, one, pooling, "eager")
        step = Step(at, OURS, pooling)
        yield Expectation.runs(f"no synchronisation in a step, {pooling}", run_without_synchronising, step)
        yield Expectation.runs(f"the same bits as a CUDA graph, {pooling}", compare, one, pooling, "graph")
    found = take_turns({name: partial(host_seconds, Step(at, name).run, at.device) for name in BACKENDS}, at.rounds)
    for name, laps in found.items():
        yield Figure.median("host time", at.setting, "head, gem", name, "step", "s", samples=laps["host"])
    ours, reference = (median(found[name]["host"]) for name in BACKENDS)
    holds = None if at.is_dry else ours <= MOST_OF_EAGER * reference
    yield Expectation(f"host time at most {MOST_OF_EAGER} of eager's", holds, f"it is {ours / reference:.2f} of it")

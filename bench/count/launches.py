"""Kernel launches of one training step of the head, and of one pass as an operator, beside eager PyTorch's.

The head's step is its forward with labels (pooling, BNNeck, classifier, revised cross entropy), its backward down to
the feature map, and the write of the memory; the optimizer is no part of it. Launches of cge_kernels go to
`cge_kernels.launching` instead of running, so results are arbitrary, but no launch depends on them. Operations of
PyTorch are counted as bench/count/operations.py says, the same for all. Nothing is timed.
"""

from collections import Counter
from collections.abc import Callable

import torch

import cge_kernels
from bench.cases import MOMENTUM, OURS, Case, arguments, contenders, head
from bench.count.operations import Operations
from bench.shapes import DTYPES, Shape

CPU = torch.device("cpu")
MOST_OWN = 8  # what a step of the head may launch of our own kernels


def count(case: Case, shape: Shape, dtype: str, contender: str) -> tuple[Counter[str], Counter[str]]:
    """What one step launches, by name: our own kernels, and ATen operations."""
    own: Counter[str] = Counter()

    def add(launch: cge_kernels.Launch) -> None:
        # The name alone: autograd copies a gradient that somebody else still holds.
        own[launch.kernel.__name__] += 1

    with cge_kernels.backend("triton" if contender == OURS else "reference"):
        step = step_of(case, shape, dtype, contender)
        with cge_kernels.launching(add), Operations() as operations:
            step()
    return own, Counter(operation.name for operation in operations.found)


def step_of(case: Case, shape: Shape, dtype: str, contender: str) -> Callable[[], None]:
    """A contender's step; the head's ends with the write of the memory."""
    if case.operator != "head":
        one = contenders(case, shape, DTYPES[dtype], CPU, with_compiled=False)[contender]
        with cge_kernels.launching(lambda launch: None):  # so that the gradients that it starts from are there
            one.backward(one.forward())
        return lambda: one.backward(one.forward())
    made, (feature_map, labels) = head(case, shape, CPU), arguments(case, shape, DTYPES[dtype], CPU)

    def step() -> None:
        output = made(feature_map, labels)
        output.loss.backward()
        made.write_memory(output.stripes, labels, MOMENTUM)

    return step

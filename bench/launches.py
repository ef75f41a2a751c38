"""Kernel launches of one training step of the CGE head, of this project and of eager PyTorch: python -m bench.launches

A step is the head's forward with labels (pooling, BNNeck, classifier, revised cross entropy), its backward down to the
feature map, and the write of the memory; the optimiser is not part of it. It runs on CPU tensors with each choice of
the head's `kernels`. The launches of cge_kernels go to `cge_kernels.launching` instead of running, so results are
arbitrary, but no launch depends on them. Operations of PyTorch are counted as bench/operations.py says, the same for
all. Nothing is timed.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import torch
from jsonargparse import ArgumentParser

import cge_kernels
from bench.operations import Operations
from bench.shapes import SHAPES, Shape, named
from bench.tables import table
from cge_fast import CGEHead, errors
from cge_fast.losses.cge import Pooling
from cge_fast.operators import Kernels

PROGRAM = "bench.launches"
MOST_OWN = 8  # what a step may launch of our own kernels
POOLINGS = get_args(Pooling)
KERNELS = get_args(Kernels)
DTYPES = ("float32", "bfloat16", "float16")


def count(shape: Shape, pooling: str, dtype: torch.dtype, kernels: Kernels) -> tuple[Counter[str], Counter[str]]:
    """What one step launches, by name: our own kernels, and ATen operations."""
    head = CGEHead(shape.channels, shape.classes, epochs=2, stripes=shape.stripes, pooling=pooling, kernels=kernels)
    size = (shape.batch, shape.channels, shape.height, shape.width)
    feature_map = torch.ones(size, dtype=dtype, requires_grad=True)
    labels = torch.arange(shape.batch) % shape.classes
    own: Counter[str] = Counter()

    def add(launch: cge_kernels.Launch) -> None:
        # The name alone: autograd copies a gradient that somebody else still holds.
        own[launch.kernel.__name__] += 1

    with cge_kernels.backend("triton"), cge_kernels.launching(add), Operations() as operations:
        output = head(feature_map, labels)
        output.loss.backward()
        head.write_memory(output.local_features, labels, epoch=1)
    return own, Counter(operation.name for operation in operations.found)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Counts the kernels that one training step of the CGE head launches at the paper's shape: our own "
        "by name, and all of them, PyTorch's operations included, beside those of plain PyTorch.",
        exit_on_error=False,
    )
    parser.add_argument("--pooling", choices=[*POOLINGS, "both"], default="both", help="of the head")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the feature map")
    parser.add_argument("--shape", default="msmt17", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    shape = named([options.shape])[options.shape]
    for pooling in POOLINGS if options.pooling == "both" else [options.pooling]:
        counts = [count(shape, pooling, getattr(torch, options.dtype), kernels) for kernels in KERNELS]
        own, aten = zip(*counts, strict=True)
        rows = [(name, *(c[name] for c in own)) for name in dict.fromkeys(name for c in own for name in c)]
        rows += [(name, *(c[name] for c in aten)) for name in sorted({name for c in aten for name in c})]
        rows += [("own kernels", *(c.total() for c in own)), ("all", *(a.total() + b.total() for a, b in counts))]
        print(f"Launches of a step of the head, {pooling} pooling, {options.dtype} map, {shape}:\n")
        print(table(("kernel", *KERNELS), rows, options.markdown))
        print(f"\nown kernels: at most {MOST_OWN}\n")


if __name__ == "__main__":
    errors.run(main, PROGRAM)

"""Calls of every operator, forward and backward, on tensors without memory, for whoever takes the launches.

Between them the shapes, dtypes and layouts reach every tile that common/tiles.py can choose; a new size class there
needs a shape here.
"""

import os
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from cge_kernels.common.budget import SCRATCH_MB
from cge_kernels.common.plan import Plan
from cge_kernels.cross_entropy.backward import launch_backward as cross_entropy_backward
from cge_kernels.cross_entropy.forward import launch_forward as cross_entropy_forward
from cge_kernels.cross_entropy.inputs import Inputs, Saved
from cge_kernels.revise_logits.backward import launch_backward as revise_backward
from cge_kernels.revise_logits.forward import launch_forward as revise_forward
from cge_kernels.revise_logits.one_pass import launch_forward as one_pass_forward
from cge_kernels.stripe_pool.triton import launch_backward as pool_backward
from cge_kernels.stripe_pool.triton import launch_forward as pool_forward
from cge_kernels.write_memory.triton import MAX_CHANNELS, launch_write


@dataclass(frozen=True)
class Shape:
    """Sizes of one training: feature map (B, C, 24, 8), memory (n, N, C)."""

    batch: int
    channels: int
    classes: int
    stripes: int = 3


PAPER = Shape(64, 2048, 1041)
# Tiles get wider where the widest ones still fill the machine, so on each target another size is the one in the middle.
# The scores of the largest batch and most classes exceed the default scratch budget.
BATCHES = (8, 32, 64, 512)
SHAPES = [
    *(Shape(batch, 2048, classes) for batch in BATCHES for classes in (100, 1041, 2000, 5000, 10_000, 50_000)),
    *(Shape(batch, channels, 1041) for batch in BATCHES for channels in (128, 512, 1280, 4096, 8192)),
]
UNEVEN = Shape(64, 2048, 1041, stripes=5)  # neighbouring stripes share a row
BLOCKS = [Shape(64, 512, classes) for classes in (200, 400, 800)]  # of which the loss takes all classes at once
EPS = 1e-6

# dtypes of map and memory, and torch's float32 matmul precision
DTYPES = [
    (torch.float32, torch.float32, "highest"),
    (torch.float32, torch.float32, "high"),
    (torch.bfloat16, torch.float32, "highest"),
    (torch.bfloat16, torch.float32, "high"),
    (torch.float16, torch.float16, "highest"),
    (torch.bfloat16, torch.bfloat16, "highest"),
]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def feature_maps(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """A contiguous map, one in channels_last, and one whose rows do not follow one another."""
    contiguous = empty(shape.batch, shape.channels, 24, 8, dtype=dtype)
    wider = empty(shape.batch, shape.channels, 24, 10, dtype=dtype)
    return [contiguous, contiguous.to(memory_format=torch.channels_last), wider[..., 1:-1]]


def call_pooling(shape: Shape, dtype: torch.dtype, every_variant: bool) -> None:
    """stripe_pool with average and GeM pooling, contiguous and channels_last.

    every_variant: also in rows that do not follow one another, and with losses that want one gradient of the two.
    """
    for feature_map in feature_maps(shape, dtype)[: 3 if every_variant else 2]:
        for p in (None, empty()):
            pooled, local = pool_forward(Plan(), feature_map, shape.stripes, p, EPS)
            for gradients in ((pooled, local), (pooled, None), (None, local))[: 3 if every_variant else 1]:
                pool_backward(Plan(), *gradients, feature_map, pooled, local, p, EPS)


def call_revision(shape: Shape, dtype: torch.dtype, memory_dtype: torch.dtype, every_variant: bool) -> None:
    """revise_logits, and revise_logits_one_pass with GeM pooling, contiguous and channels_last.

    every_variant: also with scores that do not fit in the scratch budget, without local gradient, with local features
    in the memory's dtype, with average pooling, and in rows that do not follow one another.
    """
    memory = empty(shape.stripes, shape.classes, shape.channels, dtype=memory_dtype)
    logits = empty(shape.batch, shape.classes, dtype=dtype)
    for megabytes in (SCRATCH_MB, 0)[: 2 if every_variant else 1]:
        with mock.patch.dict(os.environ, CGE_SCRATCH_MB=str(megabytes)):
            for local_dtype in {torch.float32, memory_dtype} if every_variant else [torch.float32]:
                local = empty(shape.batch, shape.stripes, shape.channels, dtype=local_dtype)
                _, scores, inv_norm = revise_forward(Plan(), logits, local, memory)
                for local_gradient in (True, False)[: 2 if every_variant else 1]:
                    revise_backward(Plan(), logits, logits, local, memory, scores, inv_norm, local_gradient)
            for feature_map in feature_maps(shape, dtype)[: 3 if every_variant else 2]:
                for p in (empty(), None)[: 2 if every_variant else 1]:
                    one_pass_forward(Plan(), feature_map, logits, memory, p, EPS)


def call_cross_entropy(shape: Shape, dtype: torch.dtype, memory_dtype: torch.dtype, every_variant: bool) -> None:
    """revised_cross_entropy of float32 features and classifier.

    every_variant: also with logits that do not fit in the scratch budget, without local gradient, with features and a
    classifier in the map's dtype, with a bias, and the statistics of some of the classes.
    """
    memory = empty(shape.stripes, shape.classes, shape.channels, dtype=memory_dtype)
    local = empty(shape.batch, shape.stripes, shape.channels)
    labels, grad = empty(shape.batch, dtype=torch.int64), empty(shape.batch)
    for megabytes in (SCRATCH_MB, 0)[: 2 if every_variant else 1]:
        with mock.patch.dict(os.environ, CGE_SCRATCH_MB=str(megabytes)):
            for feature_dtype in {torch.float32, dtype} if every_variant else [torch.float32]:
                features = empty(shape.batch, shape.channels, dtype=feature_dtype)
                weight = empty(shape.classes, shape.channels, dtype=feature_dtype)
                bias = empty(shape.classes) if every_variant else None
                inputs = Inputs(features, weight, local, memory, labels, bias, 0, shape.classes)
                _, lse, _, _, *saved = cross_entropy_forward(Plan(), *inputs[:6], 0.1)
                for local_gradient in (True, False)[: 2 if every_variant else 1]:
                    cross_entropy_backward(Plan(), inputs, grad, Saved(lse, *saved), 0.1, local_gradient)
                if every_variant:
                    cross_entropy_forward(Plan(), *inputs[:6], None)


def call_write(shape: Shape, dtype: torch.dtype) -> None:
    """write_memory_ without a low-precision memory and, for a smaller dtype, with one."""
    memory = empty(shape.stripes, shape.classes, shape.channels)
    local = empty(shape.batch, shape.stripes, shape.channels)
    labels = empty(shape.batch, dtype=torch.int64)
    launch_write(Plan(), memory, local, labels, empty(), None)
    if dtype != torch.float32:
        launch_write(Plan(), memory, local, labels, empty(), empty(*memory.shape, dtype=dtype))


def call_operators(quick: bool, dtype: torch.dtype, memory_dtype: torch.dtype) -> None:
    """Every operator on every shape.

    quick: on the paper's shape alone, without variants or a memory of another dtype than the map's.
    """
    is_mixed = dtype != memory_dtype
    if quick and is_mixed:
        return
    call_pooling(PAPER, dtype, every_variant=not quick)
    call_revision(PAPER, dtype, memory_dtype, every_variant=not quick)
    call_cross_entropy(PAPER, dtype, memory_dtype, every_variant=not quick)
    call_write(PAPER, memory_dtype)
    if quick or is_mixed:
        return
    call_pooling(UNEVEN, dtype, every_variant=True)
    call_revision(UNEVEN, dtype, memory_dtype, every_variant=False)
    for shape in (UNEVEN, *BLOCKS):
        call_cross_entropy(shape, dtype, memory_dtype, every_variant=False)
    for shape in SHAPES:
        call_revision(shape, dtype, memory_dtype, every_variant=False)
        call_cross_entropy(shape, dtype, memory_dtype, every_variant=False)
        call_write(shape, memory_dtype)
    call_write(Shape(64, MAX_CHANNELS, 1041), memory_dtype)

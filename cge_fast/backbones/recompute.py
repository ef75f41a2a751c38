"""Activation checkpointing: a backbone keeps its stages' inputs alone, and computes the rest again for gradients."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute_stages(backbone: nn.Module) -> None:
    """From now on the backward computes the forward of each stage, a child with layers of its own, a second time.

    Gradients and statistics are what they were: the second time BatchNorm takes the batch's statistics, but does not
    take them up.
    """
    for stage in backbone.children():
        if any(True for _ in stage.children()):
            contexts = partial(first_and_second, stage)
            stage.forward = partial(checkpoint, stage.forward, use_reentrant=False, context_fn=contexts)


def first_and_second(stage: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a stage is computed in at first, and again."""
    return nullcontext(), without_statistics(stage)


@contextmanager
def without_statistics(stage: nn.Module) -> Iterator[None]:
    """Inside, a BatchNorm of the stage leaves its running statistics as they are, and counts elsewhere."""
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    elsewhere = torch.zeros((), dtype=torch.int64, device=norms[0].weight.device) if norms else None
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, elsewhere
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count

"""torch.compile for training: where it can be, and what it compiles."""

from functools import cache

import torch

from cge_fast.errors import UserError
from cge_fast.losses.criterion import ReidCriterion
from cge_fast.model import ReidModel
from cge_fast.options import OptimConfig


@cache
def missing_compiler() -> str:
    """Why torch.compile cannot run here, on one line; "" if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except (torch._inductor.exc.InductorError, torch._dynamo.exc.BackendCompilerFailed) as error:
        return str(error).splitlines()[0]
    return ""


def check_compile(config: OptimConfig) -> None:
    """Raises UserError if optim.compile is set where it cannot be."""
    if not config.compile:
        return
    for other in ("cuda_graph", "checkpoint_backbone"):
        if getattr(config, other):
            raise UserError(f"optim.compile: must be false with optim.{other}, in whose place it has ways of its own")
    if why := missing_compiler():
        raise UserError(f"optim.compile: must be false, torch.compile cannot run here ({why})")


def compile_training(model: ReidModel, criterion: ReidCriterion) -> None:
    """From now on forward and backward of the network are compiled, and those of the classification loss as one graph.

    In the first step; `model.embed`, which evaluation calls, stays as it is.
    """
    model.compile()
    criterion.classification.compile(fullgraph=True)

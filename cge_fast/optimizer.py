"""From gradients to weights: the optimizer, the limit of the gradients' norm, and the weights' running average."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cge_fast.distributed import sum_over_ranks
from cge_fast.options import OptimConfig

Model = TypeVar("Model", bound=nn.Module)

MOMENTUM = 0.9  # of sgd
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=MOMENTUM),
}


def build_optimizer(config: OptimConfig, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, in one kernel for all parameters of a group."""
    return OPTIMIZERS[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, most: float, rows: Tensor | None = None) -> None:
    """Scales the gradients of all parameters together so that their norm is at most `most`, without a look at it.

    rows: the parameter of which each rank has rows of its own, if there is one; the norm is that of all ranks' rows.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    norm = get_total_norm([one.grad for one in parameters if one is not rows])
    if rows is not None and rows.grad is not None:
        square = rows.grad.square().sum()
        sum_over_ranks(square)
        norm = torch.hypot(norm, square.sqrt())
    clip_grads_with_norm_(parameters, most, norm)


class Average(Generic[Model]):
    """The exponential running average of a model's parameters and floating-point buffers, as a second model.

    Args:
        model: whose average it is; it begins with the weights as they are.
        decay: how much of the average a step keeps.
    """

    def __init__(self, model: Model, decay: float):
        self.module = deepcopy(model).requires_grad_(False)
        self._update = get_ema_multi_avg_fn(decay)

    def update(self, model: Model) -> None:
        """Takes up the model after a step. Unlike torch's AveragedModel it makes no host wait for a GPU."""
        self._update(floating(self.module), floating(model), None)


def floating(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers that are not counters."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]

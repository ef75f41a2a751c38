"""From gradients to weights: the optimizer, the limit of the gradients' norm, and the weights' running average."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from itertools import groupby
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


def parameter_groups(config: OptimConfig, backbone: nn.Module, *modules: nn.Module) -> list[dict[str, Any]]:
    """The modules' parameters in their order, in groups with `factor`, the share of the learning rate that each has."""
    layers = layers_of(backbone)
    depths = {id(parameter): 0 for parameter in backbone.parameters()}  # of a network itself, like position embeddings
    depths |= {id(parameter): depth for depth, layer in enumerate(layers) for parameter in layer}

    def factor(parameter: nn.Parameter) -> float:
        if id(parameter) not in depths:
            return 1.0
        return config.backbone_lr * config.layer_decay ** (len(layers) - 1 - depths[id(parameter)])

    every = (parameter for module in modules for parameter in module.parameters())
    return [{"params": [*parameters], "factor": share} for share, parameters in groupby(every, factor)]


def layers_of(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of a network's layers from its input to its output.

    A layer is a child, or a block of a child that is a sequence of them. What has no parts that learn, like a norm,
    goes with the layer before it.
    """
    children = [*backbone.children()]
    while len(children) == 1:
        children = [*children[0].children()]
    sequences = [child if isinstance(child, nn.Sequential | nn.ModuleList) else [child] for child in children]
    layers: list[list[nn.Parameter]] = [[]]
    for module in (module for sequence in sequences for module in sequence):
        if layers[-1] and any(True for part in module.children() for _ in part.parameters()):
            layers.append([])
        layers[-1] += module.parameters()
    return layers


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

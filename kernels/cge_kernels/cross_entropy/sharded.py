"""revised_cross_entropy where each rank has some of the classes.

Features, local features and labels of all ranks are gathered, each rank goes over its own classes, and what is reduced
over the ranks are the statistics of each sample's softmax: the highest logit and its class, the sum of exponentials,
the sum of logits and the label's logit. The backward makes the gradients of the gathered batch from this rank's
classes, and reduce-scatters them to the ranks whose samples they are.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cge_kernels.common.budget import empty_saved
from cge_kernels.common.checks import accumulation_dtype, check_labels
from cge_kernels.common.dispatch import is_traced
from cge_kernels.common.plan import run
from cge_kernels.common.sharding import ClassShard, gather_equal, reduce_to_own
from cge_kernels.cross_entropy import cpu
from cge_kernels.cross_entropy.backward import cross_entropy_backward
from cge_kernels.cross_entropy.forward import launch_forward
from cge_kernels.cross_entropy.inputs import Inputs, Statistics, empty_statistics


def revised_statistics(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    first_class: int, all_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`Statistics` of this rank's classes, which are those from first_class on, and what `Saved` has beside lse.

    No gradient.
    """
    inputs = features, weight, local_features, memory, labels, bias, None, False, first_class, all_classes
    return run("revised_statistics", launch_forward, statistics_on_cpu, *inputs)


def statistics_on_cpu(*inputs: Any) -> tuple[Tensor, ...]:
    """As launch_forward gives them."""
    features, weight, local_features, memory, labels, bias, _, _, *classes = inputs
    statistics, *saved = cpu.revised_statistics(
        Inputs(features, weight, local_features, memory, labels, bias, *classes)
    )
    return *statistics, *saved


revised_statistics_op = torch.library.custom_op("cge_kernels::revised_statistics", mutates_args=())(revised_statistics)


@revised_statistics_op.register_fake
def _(features, weight, local_features, memory, labels, bias, first_class, all_classes):
    dtype = accumulation_dtype(features, weight, local_features, memory)
    statistics = empty_statistics(features, len(memory), dtype)
    return *statistics, *empty_saved(len(features), memory, dtype)


class ShardedCrossEntropy(torch.autograd.Function):
    """loss (R*B,), correct (R*B,) and stripe_correct (R*B, n) of all ranks' samples, the same on every rank."""

    @staticmethod
    def forward(
        ctx, features, weight, local_features, memory, labels, bias, label_smoothing, local_gradient, shard: ClassShard
    ):
        features, local_features, labels = (gather_equal(x, shard.group) for x in (features, local_features, labels))
        check_labels(labels, shard.classes)
        arguments = features, weight, local_features, memory, labels, bias, shard.first, shard.classes
        traced = is_traced(*arguments[:6])
        *own, saved_logits, inv_norm = (revised_statistics_op if traced else revised_statistics)(*arguments)
        statistics = reduce_statistics(Statistics(*own), shard)
        loss, lse, correct, stripe_correct = cpu.loss_of_statistics(statistics, labels, shard.classes, label_smoothing)
        ctx.settings = label_smoothing, local_gradient, shard
        ctx.save_for_backward(lse, features, weight, local_features, memory, labels, bias, saved_logits, inv_norm)
        ctx.mark_non_differentiable(correct, stripe_correct)
        return loss, correct, stripe_correct

    @staticmethod
    def backward(ctx, grad, *_):
        label_smoothing, local_gradient, shard = ctx.settings
        local_gradient = local_gradient and ctx.needs_input_grad[2]
        grad_features, grad_weight, grad_local, grad_bias = cross_entropy_backward(
            grad, ctx.saved_tensors, label_smoothing, shard.first, shard.classes, local_gradient
        )
        ranks = dist.get_world_size(shard.group)  # DistributedDataParallel will divide by it
        grad_features = reduce_to_own(grad_features, shard.group).mul_(ranks)
        grad_local = reduce_to_own(grad_local, shard.group).mul_(ranks) if local_gradient else None
        grad_bias = grad_bias if ctx.needs_input_grad[5] else None
        return grad_features, grad_weight, grad_local, None, None, grad_bias, None, None, None


def reduce_statistics(own: Statistics, shard: ClassShard) -> Statistics:
    """Statistics over all classes, on every rank, from those of each rank's classes."""
    row_max = own.row_max.clone()
    dist.all_reduce(row_max, dist.ReduceOp.MAX, group=shard.group)
    argmax = torch.where(own.row_max == row_max, own.argmax, shard.classes)  # of ranks that tie the lowest class wins
    dist.all_reduce(argmax, dist.ReduceOp.MIN, group=shard.group)
    summed = torch.cat([own.sums_below(row_max), own.label_logit.unsqueeze(0)])
    dist.all_reduce(summed, group=shard.group)
    return Statistics(row_max, argmax, summed[:2], summed[2])

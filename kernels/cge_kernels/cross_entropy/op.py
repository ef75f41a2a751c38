"""Cross entropy of the revised logits, straight from features and classifier: no (B, N) tensor.

Forward   p = f W^T + b;  s_i, w and p^ = p * w as in revise_logits.py, in tiles of classes whose statistics alone are
          stored: max, sum of exp(p^ - max), sum of p^, arg max, and each stripe's arg max; log_sum = max + log sum.
          loss = log_sum - (1 - e) p^[label] - e/N sum_k p^[k].
Backward  dp^ = g (exp(p^ - log_sum) - e/N - (1 - e) onehot);  dp = dp^ w;  ds_i = dp^ p^ (1 - sigmoid(s_i)) / n;
          dW = dp^T f, df = dp W, db = sum of dp, du_i = ds_i M_i, df_i = (du_i - u_i <u_i, du_i>) / ||f_i||.
Kernels: prepare (see revise_logits.py), cross_entropy, combine, and backwards grad_logits and project, beside library
matmuls. Half of CGE_SCRATCH_MB is for p and s_i: the forward keeps them if they fit, else the backward computes them
again, chunk of classes by chunk. The other half is for the gradients of a chunk.
"""

import torch
from torch import Tensor

from cge_kernels.common import checks
from cge_kernels.common.checks import (
    accumulation_dtype,
    require_memory,
    require_same_device,
    require_shape,
    require_tensor,
)
from cge_kernels.common.dispatch import implementation
from cge_kernels.common.tiles import logits_are_kept, score_row, scratch_bytes
from cge_kernels.cross_entropy import cpu
from cge_kernels.cross_entropy.backward import revised_cross_entropy_backward_op
from cge_kernels.cross_entropy.forward import launch_forward, launch_statistics


@torch.library.custom_op("cge_kernels::valid_labels", mutates_args=())
def valid_labels(labels: Tensor, classes: int) -> Tensor:
    """checks.valid_labels, whose look at CPU labels torch.compile could not trace."""
    return checks.valid_labels(labels, classes)


@valid_labels.register_fake
def _(labels, classes):
    return torch.empty_like(labels, dtype=torch.bool)


@torch.no_grad()
def local_hits(local_features: Tensor, memory: Tensor, labels: Tensor) -> Tensor:
    """(B, n) bool: whether the arg max of a stripe's scores is the label, ties to the lowest index.

    The scores are computed in chunks of classes.
    """
    stripes, classes, _ = memory.shape
    batch = len(labels)
    dtype = accumulation_dtype(local_features, memory)
    operand = local_features.to(memory.dtype).to(dtype).transpose(0, 1)
    best = operand.new_full((stripes, batch), -torch.inf)
    winner = labels.new_zeros((stripes, batch), dtype=torch.int64)
    chunk = max(1, scratch_bytes() // (stripes * batch * 4))
    for start in range(0, classes, chunk):
        rows = memory[:, start : start + chunk].to(dtype)
        with torch.autocast(rows.device.type, enabled=False):
            products = torch.bmm(operand, rows.transpose(1, 2))
        highest, where = products.max(dim=2)
        winner = torch.where(highest > best, where + start, winner)
        best = torch.maximum(best, highest)
    return labels.unsqueeze(1) == winner.T


def loss_of_statistics(
    highest: Tensor, winner: Tensor, sums: Tensor, target: Tensor, labels: Tensor, classes: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss and log_sum (B,), hit (B,) and local_hit (B, n) from the statistics over all N classes."""
    log_sum = highest[0] + sums[0].log()
    loss = log_sum - (1 - label_smoothing) * target - label_smoothing * (sums[1] / classes)
    loss = torch.where((labels >= 0) & (labels < classes), loss, torch.nan)
    hits = winner == labels
    return loss, log_sum, hits[0].clone(), hits[1:].T.contiguous()


def aten_forward(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """launch_forward on ATen."""
    *statistics, kept, scale = cpu.revised_statistics(features, weight, local_features, memory, labels, bias, 0)
    return *loss_of_statistics(*statistics, labels, memory.shape[1], label_smoothing), kept, scale


@torch.library.custom_op("cge_kernels::revised_cross_entropy", mutates_args=())
def revised_cross_entropy_op(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    label_smoothing: float, local_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if labels.device.type == "cpu":
        checks.valid_labels(labels, memory.shape[1])
    run = implementation(launch_forward, aten_forward, features, weight, local_features, memory)
    return run(features, weight, local_features, memory, labels, bias, label_smoothing)


@revised_cross_entropy_op.register_fake
def _(features, weight, local_features, memory, labels, bias, label_smoothing, local_gradient):
    batch, stripes, _ = local_features.shape
    dtype = accumulation_dtype(features, weight, local_features, memory)
    rows = memory.shape[1] if logits_are_kept(batch, stripes, memory.shape[1]) else 0
    return (
        features.new_empty(batch, dtype=dtype),
        features.new_empty(batch, dtype=dtype),
        features.new_empty(batch, dtype=torch.bool),
        features.new_empty(batch, stripes, dtype=torch.bool),
        features.new_empty(stripes + 1, rows, score_row(batch), dtype=dtype),
        features.new_empty(stripes, batch, dtype=dtype),
    )


def setup_context(ctx, inputs, output) -> None:
    features, weight, local_features, memory, labels, bias, ctx.label_smoothing, ctx.local_gradient = inputs
    _, log_sum, hit, local_hit, kept, scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(hit, local_hit)
    ctx.save_for_backward(log_sum, features, weight, local_features, memory, labels, bias, kept, scale)


def backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    local_gradient = ctx.local_gradient and ctx.needs_input_grad[2]
    memory, bias = ctx.saved_tensors[4], ctx.saved_tensors[6]
    grad_features, grad_weight, grad_local, grad_bias = revised_cross_entropy_backward_op(
        grad.contiguous(), *ctx.saved_tensors, ctx.label_smoothing, 0, memory.shape[1], local_gradient
    )
    grad_local = grad_local if local_gradient else None
    return grad_features, grad_weight, grad_local, None, None, grad_bias if bias is not None else None, None, None


revised_cross_entropy_op.register_autograd(backward, setup_context=setup_context)


@torch.library.custom_op("cge_kernels::revised_statistics", mutates_args=())
def revised_statistics_op(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    first_class: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the ranks of a run reduce where each has some classes, from first_class on; labels are of all classes.

    Returns highest (n+1, B), of the revised logits and of each stripe's scores; winner (n+1, B) int64, the lowest class
    that has it; sums (2, B), of exp(revised - highest) and of the revised logits; target (B,), the label's revised
    logit, 0 where another rank has it; kept and scale, for `revised_cross_entropy_backward_op`. No gradient.
    """
    run = implementation(launch_statistics, cpu.revised_statistics, features, weight, local_features, memory)
    return run(features, weight, local_features, memory, labels, bias, first_class)


@revised_statistics_op.register_fake
def _(features, weight, local_features, memory, labels, bias, first_class):
    batch, stripes, _ = local_features.shape
    dtype = accumulation_dtype(features, weight, local_features, memory)
    rows = memory.shape[1] if logits_are_kept(batch, stripes, memory.shape[1]) else 0
    return (
        features.new_empty(stripes + 1, batch, dtype=dtype),
        features.new_empty(stripes + 1, batch, dtype=torch.int64),
        features.new_empty(2, batch, dtype=dtype),
        features.new_empty(batch, dtype=dtype),
        features.new_empty(stripes + 1, rows, score_row(batch), dtype=dtype),
        features.new_empty(stripes, batch, dtype=dtype),
    )


def revised_cross_entropy(
    features: Tensor,
    weight: Tensor,
    local_features: Tensor,
    memory: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.1,
    local_gradient: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Label-smoothed cross entropy of (features @ weight.T + bias) * w, with w as in `revise_logits`.

    The target is (1 - e) * onehot + e / N (the paper's equation 5). The operands of both products are cast to the
    memory's dtype, and so are the logits' and scores' gradients for the backward's products (a float16 memory wants the
    usual loss scaling); sums and the loss are float32 (float64 if an argument is).

    Args:
        features: (B, C), floating: what the classifier sees, after BNNeck and times logit_scale.
        weight: (N, C), floating: the classifier's rows.
        local_features: (B, n, C'), floating.
        memory: (n, N, C'), floating, contiguous; only read, and no gradient reaches it.
        labels: (B,), integer, in [0, N).
        label_smoothing: e, in [0, 1].
        local_gradient: whether the gradient flows through w to the local features.
        bias: (N,), floating, or None.

    Returns:
        loss (B,); hit (B,) bool, whether the arg max of the revised logits is the label; local_hit (B, n) bool, the
        same of each stripe's scores s_i. Ties go to the lowest index.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ranks, shapes or devices do not fit, label_smoothing is outside [0, 1], or (on the CPU) a label is
            outside [0, N); on a GPU such a sample has a NaN loss and no hit.
    """
    require_tensor("features", features, "(B, C)")
    require_tensor("weight", weight, "(N, C)")
    require_tensor("labels", labels, "(B,)", "an integer")
    require_tensor("local_features", local_features, "(B, n, C)")
    require_memory("memory", memory)
    require_same_device(features=features, weight=weight, local_features=local_features, memory=memory, labels=labels)
    batch, stripes, channels = local_features.shape
    classes = memory.shape[1]
    fitting = f"local_features {tuple(local_features.shape)} and memory {tuple(memory.shape)}"
    require_shape("memory", memory, (stripes, classes, channels), f"local_features {(batch, stripes, channels)}")
    require_shape("features", features, (batch, features.shape[1]), fitting)
    require_shape("weight", weight, (classes, features.shape[1]), f"memory and features {tuple(features.shape)}")
    require_shape("labels", labels, (batch,), fitting)
    if bias is not None:
        require_tensor("bias", bias, "(N,)")
        require_shape("bias", bias, (classes,), "weight")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")

    loss, _, hit, local_hit, _, _ = revised_cross_entropy_op(
        features, weight, local_features, memory, labels, bias, float(label_smoothing), local_gradient
    )
    return loss, hit, local_hit

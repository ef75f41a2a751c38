"""Cross entropy of the revised logits, straight from features and classifier: no (B, N) tensor.

Forward   p = f W^T + b;  s_i, w and p^ = p * w as in revise_logits/op.py, in tiles of classes whose statistics alone
          are stored: max, sum of exp(p^ - max), sum of p^, arg max, and each stripe's arg max; lse = max + log sum.
          loss = lse - (1 - e) p^[label] - e/N sum_k p^[k].
Backward  dp^ = g (exp(p^ - lse) - e/N - (1 - e) onehot);  dp = dp^ w;  ds_i = dp^ p^ (1 - sigmoid(s_i)) / n;
          dW = dp^T f, df = dp W, db = sum of dp, du_i = ds_i M_i, df_i = (du_i - u_i <u_i, du_i>) / ||f_i||.
Kernels: products and loss (split.py) where class tiles do not fill the machine, else cast_and_norm (see revise_logits),
cross_entropy and reduce_tiles; for the backward grad_logits and normalize_backward, beside library matmuls. Half of
CGE_SCRATCH_MB is for p and s_i: the forward keeps them if they fit, else the backward computes them again, chunk of
classes by chunk. The other half is for the gradients of a chunk.
"""

import torch
from torch import Tensor

from cge_kernels.common import checks
from cge_kernels.common.budget import empty_saved
from cge_kernels.common.dispatch import is_traced, runs_on_reference
from cge_kernels.common.plan import Call, autograd_function, run
from cge_kernels.common.sharding import ClassShard, has_all_classes
from cge_kernels.cross_entropy import cpu
from cge_kernels.cross_entropy.backward import cross_entropy_backward
from cge_kernels.cross_entropy.forward import launch_forward
from cge_kernels.cross_entropy.inputs import empty_loss
from cge_kernels.cross_entropy.sharded import ShardedCrossEntropy


@torch.library.custom_op("cge_kernels::revised_cross_entropy", mutates_args=())
def cross_entropy_op(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    label_smoothing: float, local_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    checks.check_labels(labels, memory.shape[1])
    inputs = features, weight, local_features, memory, labels, bias, label_smoothing, local_gradient
    return run("revised_cross_entropy", launch_forward, cpu.revised_cross_entropy, *inputs)


@cross_entropy_op.register_fake
def _(features, weight, local_features, memory, labels, bias, label_smoothing, local_gradient):
    dtype = checks.accumulation_dtype(features, weight, local_features, memory)
    return *empty_loss(features, len(memory), dtype), *empty_saved(len(features), memory, dtype)


def setup_context(ctx, inputs, output) -> None:
    features, weight, local_features, memory, labels, bias, ctx.label_smoothing, ctx.local_gradient = inputs
    _, lse, correct, stripe_correct, saved_logits, inv_norm = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, correct, stripe_correct, saved_logits, inv_norm)
    ctx.save_for_backward(lse, features, weight, local_features, memory, labels, bias, saved_logits, inv_norm)


def backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    local_gradient = ctx.local_gradient and ctx.needs_input_grad[2]
    grad_features, grad_weight, grad_local, grad_bias = cross_entropy_backward(
        grad, saved, ctx.label_smoothing, 0, saved[4].shape[1], local_gradient
    )
    grad_local = grad_local if local_gradient else None
    return grad_features, grad_weight, grad_local, None, None, None if saved[6] is None else grad_bias, None, None


cross_entropy_op.register_autograd(backward, setup_context=setup_context)
eager_cross_entropy = autograd_function(
    "RevisedCrossEntropy", launch_forward, cpu.revised_cross_entropy, setup_context, backward
)


def check_loss(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    label_smoothing: float,
) -> None:  # fmt: skip
    """Raises as `revised_cross_entropy` says."""
    checks.require_tensor("features", features, "(B, C)")
    checks.require_tensor("weight", weight, "(N, C)")
    checks.require_tensor("labels", labels, "(B,)", "an integer")
    checks.check_local(local_features, memory)
    checks.require_same_device(
        features=features, weight=weight, local_features=local_features, memory=memory, labels=labels
    )
    batch, classes = len(local_features), memory.shape[1]
    fitting = f"local_features {tuple(local_features.shape)} and memory {tuple(memory.shape)}"
    checks.require_shape("features", features, (batch, features.shape[1]), fitting)
    checks.require_shape("weight", weight, (classes, features.shape[1]), f"memory and features {tuple(features.shape)}")
    checks.require_shape("labels", labels, (batch,), fitting)
    if bias is not None:
        checks.require_tensor("bias", bias, "(N,)")
        checks.require_shape("bias", bias, (classes,), "weight")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")


def revised_cross_entropy(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor,
    label_smoothing: float = 0.1, local_gradient: bool = True, bias: Tensor | None = None,
    shard: ClassShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Label-smoothed cross entropy of (features @ weight.T + bias) * w, with w as in `revise_logits`.

    The target is (1 - e) * onehot + e / N (the paper's equation 5). The factors of both products are cast to the
    memory's dtype, and so are the logits' and scores' gradients for the backward's products (a float16 memory wants the
    usual loss scaling); sums and the loss are float32 (float64 if an argument is).

    With a shard, weight, memory and bias are the rows of this rank's classes, and the results are those of the samples
    of all R ranks, in rank order, the same on every rank. Every rank must derive the same number from the loss and call
    backward on it. The features then receive R times their gradient, since DistributedDataParallel averages gradients
    over ranks; that of the weight is the true one, so the weight stays outside of it.

    Args:
        features: (B, C), floating: what the classifier sees, after BNNeck. With a shard as many on every rank.
        weight: (N, C), floating: the classifier's rows.
        local_features: (B, n, C'), floating.
        memory: (n, N, C'), floating, contiguous; only read, and no gradient reaches it.
        labels: (B,), integer, in [0, N), with a shard of all classes.
        label_smoothing: e, in [0, 1].
        local_gradient: whether the gradient flows through w to the local features.
        bias: (N,), floating, or None.
        shard: which classes this rank has; None if all of them.

    Returns:
        loss (B,); correct (B,) bool, whether the arg max of the revised logits is the label; stripe_correct (B, n)
        bool, the same of each stripe's scores s_i. Ties go to the lowest index. With a shard R*B in place of B.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ranks, shapes or devices do not fit, label_smoothing is outside [0, 1], or (on the CPU) a label is
            outside [0, N), or the ranks have different numbers of samples; on a GPU, where looking would synchronise,
            the loss of such a label is NaN, and nothing about it is correct.
    """
    label_smoothing, labels = float(label_smoothing), checks.as_int64(labels)
    arguments = features, weight, local_features, memory, labels, bias, label_smoothing, local_gradient
    call = None if is_traced(*arguments[:6]) else Call.of("revised_cross_entropy", *arguments)
    if call is None or not call.is_checked:
        check_loss(features, weight, local_features, memory, labels, bias, label_smoothing)
    if not has_all_classes(shard, memory):
        return ShardedCrossEntropy.apply(*arguments, shard)
    if runs_on_reference():
        import cge_reference

        checks.check_labels(labels, memory.shape[1])
        return cge_reference.revised_cross_entropy(*arguments[:5], label_smoothing, local_gradient, bias)
    if call is None:
        results = cross_entropy_op(*arguments)
    else:
        call.is_checked = True
        checks.check_labels(labels, memory.shape[1])  # where nobody looks, the loss of a wrong one is NaN
        results = eager_cross_entropy(*arguments, call)
    loss, _, correct, stripe_correct, _, _ = results
    return loss, correct, stripe_correct

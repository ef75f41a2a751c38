"""Local classification by cosine to a class memory (NLC) and revision of the global logits (GLR).

Forward   s_i = <f_i, M_i> / max(||f_i||, 1e-12);  log w = mean_i log sigmoid(s_i);  revised = p * w.
Backward  dp = g * w;  ds_i = g * p * w * (1 - sigmoid(s_i)) / n;
          df_i = (ds_i M_i - u_i * <ds_i, s_i>) / ||f_i||, u_i = f_i / ||f_i||: since s_i = <u_i, M_i>, the projection
          <u_i, ds_i M_i> is a sum over classes of numbers that are at hand.
Kernels: cast_and_norm (squared lengths, and the local features in the memory's dtype), revise (matmul, and in its
epilogue sigmoid, n-th root and revision), and for the backward grad_scores (elementwise) and grad_local (matmul).
The length is not summed beside the dot: the features would be needed in registers too and leave their swizzled layout.
Saved for the backward: the inputs, 1 / ||f_i|| and, if CGE_SCRATCH_MB has room for them, the scores; else the
backward computes them again, chunk of classes by chunk, in that room.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cge_kernels.common import checks
from cge_kernels.common.budget import empty_scores
from cge_kernels.common.dispatch import is_traced, runs_on_reference
from cge_kernels.common.plan import Call, autograd_function, run
from cge_kernels.revise_logits import cpu
from cge_kernels.revise_logits.backward import revise_backward, revise_logits_backward_op
from cge_kernels.revise_logits.forward import launch_forward


@torch.library.custom_op("cge_kernels::revise_logits", mutates_args=())
def revise_logits_op(
    logits: Tensor, local_features: Tensor, memory: Tensor, local_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return run("revise_logits", launch_forward, cpu.revise_logits, logits, local_features, memory, local_gradient)


@revise_logits_op.register_fake
def _(logits, local_features, memory, local_gradient):
    saved = empty_scores(len(logits), memory, checks.accumulation_dtype(local_features, memory))
    return torch.empty_like(logits, memory_format=torch.contiguous_format), *saved


def setup_context(ctx, inputs, output) -> None:
    logits, local_features, memory, ctx.local_gradient = inputs
    _, scores, inv_norm = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, local_features, memory, scores, inv_norm)


def backward(ctx, grad, _grad_scores, _grad_scale):
    if grad is None:
        return None, None, None, None
    saved, local_gradient = ctx.saved_tensors, ctx.local_gradient and ctx.needs_input_grad[1]
    differentiate: Callable = revise_logits_backward_op if is_traced(grad, *saved) else revise_backward
    grad_logits, grad_local = differentiate(grad, *saved, local_gradient)
    return grad_logits, grad_local if local_gradient else None, None, None


revise_logits_op.register_autograd(backward, setup_context=setup_context)
eager_revise_logits = autograd_function("ReviseLogits", launch_forward, cpu.revise_logits, setup_context, backward)


def check_revision(logits: Tensor, local_features: Tensor, memory: Tensor) -> None:
    """Raises as `revise_logits` says."""
    checks.require_tensor("logits", logits, "(B, N)")
    checks.check_local(local_features, memory)
    checks.require_same_device(logits=logits, memory=memory)
    fitting = f"local_features and memory {tuple(memory.shape)}"
    checks.require_shape("logits", logits, (len(local_features), memory.shape[1]), fitting)


def revise_logits(logits: Tensor, local_features: Tensor, memory: Tensor, local_gradient: bool = True) -> Tensor:
    """Multiplies the global logits by what the local classifiers think of each class (the paper's module GLR).

    s_i[k] = <f_i, M[i,k]> / max(||f_i||, 1e-12);  w = (prod_i sigmoid(s_i))^(1/n);  revised = logits * w.
    Both factors of the product are cast to the memory's dtype; sums are float32 (float64 if an argument is). float32
    products follow torch's setting for float32 matmuls.

    Args:
        logits: (B, N), floating.
        local_features: (B, n, C), floating.
        memory: (n, N, C), floating, contiguous; only read, and no gradient reaches it. Write it after the backward.
        local_gradient: whether the gradient flows through w to the local features.

    Returns:
        revised (B, N) in the dtype of the logits.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: ranks, shapes or devices do not fit, or the memory is not contiguous.
    """
    arguments = logits, local_features, memory, local_gradient
    call = None if is_traced(*arguments[:3]) else Call.of("revise_logits", *arguments)
    if call is None or not call.is_checked:
        check_revision(*arguments[:3])
    if runs_on_reference():
        import cge_reference

        return cge_reference.revise_logits(*arguments)
    if call is None:
        return revise_logits_op(*arguments)[0]
    call.is_checked = True
    return eager_revise_logits(*arguments, call)[0]

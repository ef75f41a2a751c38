"""Pooling of a feature map into one global feature and n stripe features, from a single read of the map.

Forward   average  f = mean(x);   GeM  f = mean(max(x, eps)^p)^(1/p) = exp2(log2(mean) / p), x^p = exp2(p log2 x).
Backward  average  dx = sum over the features that contain x of g / count: the map is only written.
          GeM      dx = sum of (g / count) (x / f)^(p-1), in the log domain so that no power overflows;
                   dp = (1/p) sum over x of x * (sum over its features of their share of dx times ln(x / f)).
Saved for the backward: the map, p and both results.
"""

import torch
from torch import Tensor

from cge_kernels.common.checks import accumulation_dtype, require_same_device, require_tensor
from cge_kernels.common.dispatch import is_traced, runs_on_reference
from cge_kernels.common.plan import Call, autograd_function, run
from cge_kernels.stripe_pool import cpu, triton


@torch.library.custom_op("cge_kernels::stripe_pool", mutates_args=())
def stripe_pool_op(feature_map: Tensor, stripes: int, p: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return run("stripe_pool", triton.launch_forward, cpu.stripe_pool, feature_map, stripes, p, eps)


@stripe_pool_op.register_fake
def _(feature_map, stripes, p, eps):
    batch, channels = feature_map.shape[:2]
    dtype = accumulation_dtype(feature_map)
    return (
        feature_map.new_empty(batch, channels, dtype=dtype),
        feature_map.new_empty(batch, stripes, channels, dtype=dtype),
    )


def pool_backward(
    grad_global: Tensor | None, grad_local: Tensor | None, feature_map: Tensor, global_feature: Tensor | None,
    local_features: Tensor, p: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = grad_global, grad_local, feature_map, global_feature, local_features, p, eps
    return run("stripe_pool_backward", triton.launch_backward, cpu.stripe_pool_backward, *inputs)


stripe_pool_backward_op = torch.library.custom_op("cge_kernels::stripe_pool_backward", mutates_args=())(pool_backward)


@stripe_pool_backward_op.register_fake
def _(grad_global, grad_local, feature_map, global_feature, local_features, p, eps):
    return torch.empty_like(feature_map), feature_map.new_empty((), dtype=local_features.dtype)


def setup_context(ctx, inputs, output) -> None:
    feature_map, _, p, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(feature_map, p, *output)


def backward(ctx, grad_global, grad_local):
    feature_map, p, global_feature, local_features = ctx.saved_tensors
    traced = is_traced(feature_map, grad_global, grad_local)
    grad_map, grad_p = (stripe_pool_backward_op if traced else pool_backward)(
        grad_global, grad_local, feature_map, global_feature, local_features, p, ctx.eps
    )
    return grad_map, None, None if p is None else grad_p, None


stripe_pool_op.register_autograd(backward, setup_context=setup_context)
eager_stripe_pool = autograd_function("StripePool", triton.launch_forward, cpu.stripe_pool, setup_context, backward)


def check_pooling(feature_map: Tensor, stripes: int, p: float | Tensor | None) -> None:
    """Raises as `stripe_pool` says."""
    require_tensor("feature_map", feature_map, "(B, C, H, W)")
    height = feature_map.shape[2]
    if 0 in feature_map.shape[1:]:
        raise ValueError(f"feature_map must have no empty dimension but B, got {tuple(feature_map.shape)}")
    if not 1 <= stripes <= height:
        raise ValueError(f"stripes must lie between 1 and the feature map's height {height}, got {stripes}")
    if isinstance(p, Tensor):
        if p.dim() != 0:
            raise ValueError(f"p must be a number or a 0-d tensor, got shape {tuple(p.shape)}")
        require_same_device(feature_map=feature_map, p=p)


def exponent(p: float | Tensor | None, feature_map: Tensor) -> Tensor | None:
    """p as a 0-d tensor on the map's device in the dtype of the sums, or None."""
    dtype = accumulation_dtype(feature_map)
    if p is None or isinstance(p, Tensor):
        return None if p is None else p.to(dtype)
    return feature_map.new_full((), p, dtype=dtype)  # filled on the device: a copy from the host would wait for it


def stripe_pool(
    feature_map: Tensor, stripes: int, p: float | Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Pools a feature map over all its rows and over each of n horizontal stripes, reading it once.

    Stripe i has the rows floor(i*H/n) .. ceil((i+1)*H/n)-1; neighbours overlap by a row where n does not divide H.
    Average (p is None): f = mean(x). Generalised mean (GeM): f = mean(max(x, eps)^p)^(1/p), one p for all features.
    The local features f_i are the input of the paper's module NLC.

    Args:
        feature_map: (B, C, H, W), float16, bfloat16, float32 or, but for Triton, float64; any strides, never copied.
        stripes: n, 1 <= n <= H.
        p: GeM's exponent, a number or a 0-d tensor (which may be learnt); None for average pooling.
        eps: GeM's lower bound of the activations.

    Returns:
        global_feature (B, C) and local_features (B, n, C): float64 for a float64 map, else float32.

    Raises:
        TypeError: the map is not a floating tensor.
        ValueError: it has another rank or an empty dimension, n is outside 1..H, or p is a tensor with dimensions or on
            another device.
    """
    eps = float(eps)
    call = None if is_traced(feature_map) else Call.of("stripe_pool", feature_map, stripes, p, eps)
    if call is None or not call.is_checked:
        check_pooling(feature_map, stripes, p)
    p = exponent(p, feature_map)
    if runs_on_reference():
        import cge_reference

        return cge_reference.stripe_pool(feature_map, stripes, p, eps)
    if call is None:
        return stripe_pool_op(feature_map, stripes, p, eps)
    call.is_checked = True
    return eager_stripe_pool(feature_map, stripes, p, eps, call)

"""Pooling of a feature map into one global feature and n stripe features."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from cge_reference.checks import accumulation_dtype, require_tensor, without_autocast


@without_autocast
def stripe_pool(
    feature_map: Tensor, stripes: int, p: float | Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Pools a feature map over all its rows and over each of n horizontal stripes.

    Stripe i has the rows floor(i*H/n) .. ceil((i+1)*H/n)-1; neighbours overlap by a row where n does not divide H.
    Average (p is None): f = mean(x). Generalised mean (GeM): f = mean(max(x, eps)^p)^(1/p), one p for all features.
    The local features f_i are the input of the paper's module NLC.

    Args:
        feature_map: (B, C, H, W), float16, bfloat16, float32 or float64, any strides.
        stripes: n, 1 <= n <= H.
        p: GeM's exponent, a number or a 0-d tensor (which may be learnt); None for average pooling.
        eps: GeM's lower bound of the activations.

    Returns:
        global_feature (B, C) and local_features (B, n, C): float64 for a float64 map, else float32.

    Raises:
        TypeError: the map is not a floating tensor.
        ValueError: it has another rank or an empty dimension, n is outside 1..H, or p is a tensor with dimensions.
    """
    require_tensor("feature_map", feature_map, "(B, C, H, W)")
    height = feature_map.shape[2]
    if 0 in feature_map.shape[1:]:
        raise ValueError(f"feature_map must have no empty dimension but B, got {tuple(feature_map.shape)}")
    if not 1 <= stripes <= height:
        raise ValueError(f"stripes must lie between 1 and the feature map's height {height}, got {stripes}")
    if isinstance(p, Tensor) and p.dim() != 0:
        raise ValueError(f"p must be a number or a 0-d tensor, got shape {tuple(p.shape)}")

    activations = feature_map.to(accumulation_dtype(feature_map))
    if p is not None:
        p = torch.as_tensor(p, dtype=activations.dtype, device=activations.device)
        activations = activations.clamp(min=eps).pow(p)
    global_feature = activations.mean(dim=(2, 3))
    local_features = adaptive_avg_pool2d(activations, (stripes, 1)).squeeze(3).transpose(1, 2)
    if p is not None:
        # eps^p underflows for large p, and the gradient of 0^(1/p) is not finite.
        smallest = torch.finfo(activations.dtype).tiny
        global_feature = global_feature.clamp(min=smallest).pow(1 / p)
        local_features = local_features.clamp(min=smallest).pow(1 / p)
    return global_feature, local_features

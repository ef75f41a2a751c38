"""Pooling of a feature map into one global feature and n stripe features."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from cge_reference.common import accumulation_dtype, without_autocast


@without_autocast
def stripe_pool(
    feature_map: Tensor, stripes: int, p: float | Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Pools a feature map (B, C, H, W) over all its rows and over each of n horizontal stripes.

    Stripe i has the rows floor(i*H/n) .. ceil((i+1)*H/n)-1; neighbours overlap by a row where n does not divide H.
    Average (p is None): f = mean(x). Generalised mean (GeM): f = mean(max(x, eps)^p)^(1/p), one p for all features.

    Returns global_feature (B, C) and local_features (B, n, C): float64 for a float64 map, else float32.
    """
    x = feature_map.to(accumulation_dtype(feature_map))
    if p is not None:
        p = p.to(x.dtype) if isinstance(p, Tensor) else x.new_full((), p)
        x = x.clamp(min=eps).pow(p)
    global_feature = x.mean(dim=(2, 3))
    local_features = adaptive_avg_pool2d(x, (stripes, 1)).squeeze(3).transpose(1, 2)
    if p is not None:
        # eps^p underflows for large p, and the gradient of 0^(1/p) is not finite.
        smallest = torch.finfo(x.dtype).tiny
        global_feature = global_feature.clamp(min=smallest).pow(1 / p)
        local_features = local_features.clamp(min=smallest).pow(1 / p)
    return global_feature, local_features

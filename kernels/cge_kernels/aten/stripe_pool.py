"""stripe_pool on ATen."""

import torch
from torch import Tensor

from cge_kernels.checks import accumulation_dtype


def rows_of_stripes(height: int, stripes: int) -> list[tuple[int, int]]:
    """First row and end of each stripe."""
    return [(i * height // stripes, -(-(i + 1) * height // stripes)) for i in range(stripes)]


def stripe_pool(feature_map: Tensor, stripes: int, p: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Global (B, C) and local (B, n, C) features."""
    x = feature_map.to(accumulation_dtype(feature_map))
    if p is not None:
        x = x.clamp(min=eps).pow(p)
    rows = rows_of_stripes(feature_map.shape[2], stripes)
    features = [x.mean(dim=(2, 3)), torch.stack([x[:, :, a:b].mean(dim=(2, 3)) for a, b in rows], dim=1)]
    if p is not None:
        features = [f.clamp(min=torch.finfo(x.dtype).tiny).pow(1 / p) for f in features]
    return features[0], features[1]


def stripe_pool_backward(
    grad_global: Tensor | None,
    grad_local: Tensor | None,
    feature_map: Tensor,
    global_feature: Tensor | None,
    local_features: Tensor,
    p: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of the map, and of p (0-d; 0 for average pooling)."""
    _, _, height, width = feature_map.shape
    x = feature_map.to(local_features.dtype)
    positive = x.clamp(min=eps)
    grad = torch.zeros_like(x)
    grad_p = x.new_zeros(())
    parts = [] if grad_global is None else [(0, height, grad_global, global_feature)]
    if grad_local is not None:
        rows = rows_of_stripes(height, local_features.shape[1])
        parts += [(a, b, grad_local[:, i], local_features[:, i]) for i, (a, b) in enumerate(rows)]
    for first, end, g, f in parts:
        g = (g / ((end - first) * width))[:, :, None, None]
        if p is not None:
            f = f[:, :, None, None]
            g = torch.where(f <= (torch.finfo(f.dtype).tiny * 1.01) ** (1 / p), 0, g)
            ratio = positive[:, :, first:end] / f
            g = g * ratio.pow(p - 1)
            grad_p += (positive[:, :, first:end] * g * ratio.log()).sum() / p
        grad[:, :, first:end] += g
    if p is not None:
        grad = torch.where(x >= eps, grad, 0)
    return grad.to(feature_map.dtype), grad_p

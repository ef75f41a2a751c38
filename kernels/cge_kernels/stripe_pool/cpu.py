"""stripe_pool for the CPU, in cache-sized blocks.

A block of samples and channels goes through all operations before the next one is read, so that only its first read
and its last write leave the cache. Scratch is allocated once for all blocks.
Rows are summed by bands, runs of rows that lie in the same stripes: every stripe, and the whole map, is a run of bands.
GeM   x^p = exp2(p log2 x), much faster than pow.
      dx = x^(p-1) * sum of k over the features that contain x, k = g / count * f^(1-p).
      Neither power overflows: both are taken relative to r, the band's smallest f (for p < 1 its largest), as
      exp2((p-1) (log2 x - log2 r)) and (f/r)^(1-p) <= 1; (x/r)^(p-1) is bounded since x^p <= count * f^p.
      dp = (1/p) (sum of x ln(x) dx - sum of g f ln(f)), since a feature's x dx add up to g f.
"""

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from cge_kernels.common.checks import accumulation_dtype
from cge_kernels.common.recycle import recycled_empty_like
from cge_kernels.common.tiles import cdiv

BLOCK = 1 << 20  # elements of a block: its scratch stays in a shared cache, and each operation is worth two threads


def rows_of_stripes(height: int, stripes: int) -> list[tuple[int, int]]:
    """First row and end of each stripe."""
    return [(i * height // stripes, cdiv((i + 1) * height, stripes)) for i in range(stripes)]


@cache
def edges_of_bands(height: int, stripes: int) -> list[int]:
    """The rows at which a stripe begins or ends, in order."""
    return sorted({edge for rows in rows_of_stripes(height, stripes) for edge in rows})


@cache
def parts(height: int, stripes: int) -> list[tuple[slice, int]]:
    """Which bands the whole map and then each stripe consist of, and their number of rows."""
    edges = edges_of_bands(height, stripes)
    rows = [(0, height), *rows_of_stripes(height, stripes)]
    return [(slice(edges.index(first), edges.index(end)), end - first) for first, end in rows]


def by_bands(block: Tensor, stripes: int) -> list[tuple[slice, Tensor]]:
    """Which bands, and their rows of a block (B, C, H, W) as (B, C, bands, rows, W): all at once if equally high."""
    edges = edges_of_bands(block.shape[2], stripes)
    if len({end - first for first, end in pairwise(edges)}) == 1:
        return [(slice(None), block.unflatten(2, (len(edges) - 1, -1)))]
    return [(slice(i, i + 1), block[:, :, a:b].unsqueeze(2)) for i, (a, b) in enumerate(pairwise(edges))]


def blocks(feature_map: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and channels of each block: several samples, or some of the channels of one."""
    batch, channels, height, width = feature_map.shape
    samples = max(1, BLOCK // (channels * height * width))
    step = cdiv(channels, min(channels, cdiv(channels * height * width, BLOCK)))
    for sample in range(0, batch, samples):
        for channel in range(0, channels, step):
            yield slice(sample, sample + samples), slice(channel, channel + step)


def channels_are_contiguous(feature_map: Tensor) -> bool:
    """Whether the channels of a position lie closer together than the positions of a channel."""
    return feature_map.stride(1) < feature_map.stride(3)


def scratch_for(feature_map: Tensor, count: int) -> Tensor:
    """(count, elements of the largest block), in the dtype of the sums."""
    largest = max((feature_map[block].numel() for block in blocks(feature_map)), default=0)
    return feature_map.new_empty(count, largest, dtype=accumulation_dtype(feature_map))


def shaped(scratch: Tensor, block: Tensor) -> Tensor:
    """The first elements of a row of scratch in the shape of a block (B, C, H, W), its contiguous axis contiguous."""
    batch, channels, height, width = block.shape
    elements = scratch[: block.numel()]
    if channels_are_contiguous(block):
        return elements.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return elements.view(block.shape)


def empty_by_bands(feature_map: Tensor, stripes: int) -> Tensor:
    """(B, C, bands), the axis contiguous along which sums over the map's contiguous axis fall."""
    batch, channels, height, _ = feature_map.shape
    count = len(edges_of_bands(height, stripes)) - 1
    dtype = accumulation_dtype(feature_map)
    if channels_are_contiguous(feature_map):
        return feature_map.new_empty(batch, count, channels, dtype=dtype).transpose(1, 2)
    return feature_map.new_empty(batch, channels, count, dtype=dtype)


def stripe_pool(feature_map: Tensor, stripes: int, p: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Global (B, C) and local (B, n, C) features."""
    _, _, height, width = feature_map.shape
    dtype = accumulation_dtype(feature_map)
    sums = empty_by_bands(feature_map, stripes)
    if p is not None:
        scratch = scratch_for(feature_map, 1)[0]
    for block in blocks(feature_map):
        x = feature_map[block].to(dtype)
        if p is not None:
            x = torch.clamp(x, min=eps, out=shaped(scratch, x)).log2_().mul_(p).exp2_()
        for bands, rows in by_bands(x, stripes):
            torch.sum(rows, dim=(3, 4), out=sums[block][:, :, bands])
    sums = sums.transpose(1, 2).contiguous()
    global_feature = sums.sum(dim=1).div_(height * width)
    if sums.shape[1] == stripes:  # each is a band of its own
        local_features = sums.div_(height // stripes * width)
    else:
        _, *own = parts(height, stripes)
        local_features = torch.stack([sums[:, bands].sum(dim=1).div_(rows * width) for bands, rows in own], dim=1)
    if p is not None:
        for feature in (global_feature, local_features):
            feature.clamp_(min=torch.finfo(dtype).tiny).log2_().div_(p).exp2_()
    return global_feature, local_features


def stripe_pool_backward(
    grad_global: Tensor | None, grad_local: Tensor | None, feature_map: Tensor, global_feature: Tensor | None,
    local_features: Tensor, p: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the map, and of p (0-d; 0 for average pooling)."""
    _, _, height, width = feature_map.shape
    whole_map, *each_stripe = parts(height, local_features.shape[1])
    features = []  # those with a gradient: bands, number of positions, gradient, feature
    if grad_global is not None:
        features.append((whole_map[0], height * width, grad_global, global_feature))
    if grad_local is not None:
        gradients, pooled = grad_local.unbind(1), local_features.unbind(1)
        for (bands, rows), grad, feature in zip(each_stripe, gradients, pooled, strict=True):
            features.append((bands, rows * width, grad, feature))
    if p is None:
        return average_backward(features, feature_map, local_features)
    return gem_backward(features, feature_map, local_features, p.item(), eps)


def average_backward(features: list[tuple], feature_map: Tensor, local_features: Tensor) -> tuple[Tensor, Tensor]:
    """dx = sum of g / count over the features that contain x; features: bands, count, g (B, C) and f (B, C) of each."""
    stripes = local_features.shape[1]
    share = empty_by_bands(feature_map, stripes).zero_()
    for bands, count, grad, _ in features:
        share[:, :, bands].add_(grad.unsqueeze(2), alpha=1 / count)
    grad_map = recycled_empty_like(feature_map)
    for bands, rows in by_bands(grad_map, stripes):
        rows.copy_(share[:, :, bands, None, None])
    return grad_map, local_features.new_zeros(())


def gem_backward(
    features: list[tuple], feature_map: Tensor, local_features: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor]:
    """dx and dp as this module's docstring says; features as for average_backward."""
    stripes, dtype = local_features.shape[1], local_features.dtype
    log_features = [feature.log2() for _, _, _, feature in features]
    nearest = torch.minimum if p >= 1 else torch.maximum
    log_reference = empty_by_bands(feature_map, stripes).fill_(math.copysign(math.inf, p - 1))
    for (bands, *_), log_feature in zip(features, log_features, strict=True):
        nearest(own := log_reference[:, :, bands], log_feature.unsqueeze(2), out=own)
    factor = empty_by_bands(feature_map, stripes).zero_()
    sum_of_logs = factor.new_zeros((), dtype=torch.float64)
    # Below this the forward clamped the mean of x^p, so no gradient passes.
    log_clamped = math.log2(torch.finfo(dtype).tiny) + 0.01
    for (bands, count, grad, feature), log_feature in zip(features, log_features, strict=True):
        grad = grad.masked_fill(p * log_feature <= log_clamped, 0)
        relative = log_feature.unsqueeze(2) - log_reference[:, :, bands]
        factor[:, :, bands].add_((grad / count).unsqueeze(2) * relative.mul_(1 - p).exp2_())
        sum_of_logs -= (grad * feature).mul_(log_feature).sum()
    offset = log_reference.mul_(1 - p)

    grad_map = recycled_empty_like(feature_map)
    scratch = scratch_for(feature_map, 3)
    below_eps = torch.tensor(eps, dtype=dtype).nextafter(torch.tensor(-math.inf, dtype=dtype)).item()
    for block in blocks(feature_map):
        x = feature_map[block]
        positive, log_x, grad = (shaped(row, x) for row in scratch)
        torch.clamp(x.to(dtype), min=eps, out=positive)
        torch.log2(positive, out=log_x)
        for (bands, rows), (_, log_rows) in zip(by_bands(grad, stripes), by_bands(log_x, stripes), strict=True):
            torch.add(offset[block][:, :, bands, None, None], log_rows, alpha=p - 1, out=rows)
            rows.exp2_().mul_(factor[block][:, :, bands, None, None])
        log_x.mul_(positive)
        sum_of_logs += torch.dot(*scratch[1:, : x.numel()])
        # 0 where x < eps
        torch.ops.aten.threshold_backward.grad_input(grad, x, below_eps, grad_input=grad_map[block])
    return grad_map, (sum_of_logs * (math.log(2) / p)).to(dtype)

"""The kernels of stripe_pool and their launches; op.py has the formulas.

A program owns one sample and BLOCK_C channels. It walks down the rows: those of one stripe alone, then the row that the
stripe shares with the next one (where n does not divide H), so that each element is loaded, and its gradient stored,
exactly once; the global sum comes from the same loads.
"""

from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.device_functions import jit, product, tl, triton
from cge_kernels.common.launch import Tiles
from cge_kernels.common.plan import Plan
from cge_kernels.common.tiles import POOL, POOL_BACKWARD, cdiv, contiguous_axis

# Below this log2 of a mean x^p the forward clamps the mean (at 2^-126), so no gradient passes.
LOG2_CLAMPED = tl.constexpr(-125.99) if triton else None


@jit
def clamped(x, eps):
    """max(x, eps), where NaN stays NaN as in torch.clamp."""
    return tl.maximum(x, eps, propagate_nan=tl.PropagateNan.ALL)


@jit
def position_offsets(position, stride_h, stride_w, WIDTH: tl.constexpr, FLAT: tl.constexpr):
    """Offsets of positions h * W + w in a channel's plane; FLAT: rows follow one another, so positions do too."""
    if FLAT:
        return position.to(tl.int64) * stride_w
    return (position // WIDTH).to(tl.int64) * stride_h + (position % WIDTH).to(tl.int64) * stride_w


@jit
def sum_rows(
    plane, p, eps, channel_mask, first, end, stride_h, stride_w,
    WIDTH: tl.constexpr, FLAT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(BLOCK_C,) sums of x or max(x, eps)^p over the rows first..end-1; plane: (BLOCK_C, 1) pointers to channels."""
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for start in range(first * WIDTH, end * WIDTH, BLOCK_S):
        position = start + tl.arange(0, BLOCK_S)
        mask = channel_mask[:, None] & (position < end * WIDTH)[None, :]
        offsets = position_offsets(position, stride_h, stride_w, WIDTH, FLAT)
        x = tl.load(plane + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
        if p is not None:
            x = tl.where(mask, tl.exp2(p * tl.log2(clamped(x, eps))), 0.0)
        total += x
    return tl.sum(total, axis=1)


@jit
def root_of_mean(total, count, p):
    """A feature from the sum of its x or x^p."""
    mean = total / count
    if p is not None:
        # eps^p underflows for large p; the log of the smallest normal float is -126.
        return tl.exp2(tl.log2(clamped(mean, 1.1754943508222875e-38)) / p)
    return mean


@jit
def pool_tile(
    map_ptr, p_ptr, eps, global_ptr, local_ptr, local_cast_ptr, partial_sq_norms_ptr,
    sample, tile, channels, tiles, partial_row, stride_b, stride_c, stride_h, stride_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIPES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Pools BLOCK_C channels of one sample.

    map_ptr: (B, C, H, W), any strides
    p_ptr: 0-d float32; None for average pooling
    Results; global_ptr, local_cast_ptr and partial_sq_norms_ptr may be None:
    global_ptr: (B, C) float32
    local_ptr: (B, n, C) float32
    local_cast_ptr: (B, n, C), the local features in the matmul's dtype
    partial_sq_norms_ptr: (n, tiles, partial_row) float32, this tile's share of each local feature's squared length
    """
    p = None
    if p_ptr is not None:
        p = tl.load(p_ptr)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < channels
    plane = map_ptr + tl.cast(sample, tl.int64) * stride_b + channel.to(tl.int64)[:, None] * stride_c
    whole_sum = tl.zeros([BLOCK_C], tl.float32)
    shared_with_previous = tl.zeros([BLOCK_C], tl.float32)
    first = 0
    for stripe in range(STRIPES):
        top = stripe * HEIGHT // STRIPES
        next_top = (stripe + 1) * HEIGHT // STRIPES
        bottom = ((stripe + 1) * HEIGHT + STRIPES - 1) // STRIPES
        own = sum_rows(plane, p, eps, channel_mask, first, next_top, stride_h, stride_w, WIDTH, FLAT, BLOCK_C, BLOCK_S)
        whole_sum += own
        own += shared_with_previous
        if HEIGHT % STRIPES != 0:
            shared_with_previous = sum_rows(
                plane, p, eps, channel_mask, next_top, bottom, stride_h, stride_w, WIDTH, FLAT, BLOCK_C, BLOCK_S
            )
            whole_sum += shared_with_previous
            own += shared_with_previous
        feature = root_of_mean(own, (bottom - top) * WIDTH, p)
        row = tl.cast(sample, tl.int64) * STRIPES + stripe
        tl.store(local_ptr + row * channels + channel, feature, mask=channel_mask)
        if local_cast_ptr is not None:
            tl.store(local_cast_ptr + row * channels + channel, feature, mask=channel_mask)
        if partial_sq_norms_ptr is not None:
            sq_norm = tl.sum(tl.where(channel_mask, product(feature, feature), 0.0), axis=0)
            tl.store(partial_sq_norms_ptr + tl.cast(stripe * tiles + tile, tl.int64) * partial_row + sample, sq_norm)
        first = bottom
    if global_ptr is not None:
        feature = root_of_mean(whole_sum, HEIGHT * WIDTH, p)
        tl.store(global_ptr + tl.cast(sample, tl.int64) * channels + channel, feature, mask=channel_mask)


@jit
def stripe_pool_kernel(
    map_ptr, p_ptr, global_ptr, local_ptr,
    eps, channels, map_stride_0, map_stride_1, map_stride_2, map_stride_3,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIPES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Forward: one program for each sample and BLOCK_C channels; pointers as in pool_tile."""
    tiles = tl.cdiv(channels, BLOCK_C)
    pool_tile(
        map_ptr, p_ptr, eps, global_ptr, local_ptr, None, None,
        tl.program_id(0) // tiles, tl.program_id(0) % tiles, channels, tiles, 0,
        map_stride_0, map_stride_1, map_stride_2, map_stride_3,
        HEIGHT, WIDTH, STRIPES, FLAT, BLOCK_C, BLOCK_S,
    )  # fmt: skip


@jit
def load_feature(grad_ptr, feature_ptr, offsets, mask, count, p):
    """(BLOCK_C, 1) gradient / count, 0 where the forward clamped the mean, and log2 of the feature (0 for average)."""
    grad = tl.zeros_like(offsets).to(tl.float32)
    log_feature = grad
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0) / count
        if p is not None:
            log_feature = tl.log2(tl.load(feature_ptr + offsets, mask=mask, other=1.0))
            grad = tl.where(p * log_feature <= LOG2_CLAMPED, 0.0, grad)
    return grad[:, None], log_feature[:, None]


@jit
def feature_share(grad, log_feature, log_x, p):
    """A feature's share of dx, and the same times log2(x / f), for GeM."""
    log_ratio = log_x - log_feature
    share = grad * tl.exp2((p - 1.0) * log_ratio)
    # 0 * inf where a feature takes no gradient
    share = tl.where(grad == 0.0, 0.0, share)
    return share, tl.where(grad == 0.0, 0.0, share * log_ratio)


@jit
def write_rows(
    plane, grad_plane, p, eps, grad_p, channel_mask, first, end,
    grad_global, log_global, grad_stripe, log_stripe, grad_next_stripe, log_next_stripe,
    stride_h, stride_w, grad_stride_h, grad_stride_w,
    WIDTH: tl.constexpr, FLAT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores dx of the rows first..end-1; returns the growing sum of p * dp / ln 2.

    global, stripe, next_stripe: what load_feature gives for the global feature, the rows' stripe and, for a row that
    two stripes share, the next stripe (else None).
    """
    for start in range(first * WIDTH, end * WIDTH, BLOCK_S):
        position = start + tl.arange(0, BLOCK_S)
        mask = channel_mask[:, None] & (position < end * WIDTH)[None, :]
        if p is not None:
            offsets = position_offsets(position, stride_h, stride_w, WIDTH, FLAT)
            x = tl.load(plane + offsets[None, :], mask=mask, other=0.0).to(tl.float32)
            positive = clamped(x, eps)
            log_x = tl.log2(positive)
            grad, weighted = feature_share(grad_global, log_global, log_x, p)
            share, weighted_share = feature_share(grad_stripe, log_stripe, log_x, p)
            grad += share
            weighted += weighted_share
            if grad_next_stripe is not None:
                share, weighted_share = feature_share(grad_next_stripe, log_next_stripe, log_x, p)
                grad += share
                weighted += weighted_share
            grad_p += tl.where(mask, positive * weighted, 0.0)
            grad = tl.where(x >= eps, grad, 0.0)
        else:
            grad = grad_global + grad_stripe
            if grad_next_stripe is not None:
                grad += grad_next_stripe
            grad = tl.broadcast_to(grad, mask.shape)
        offsets = position_offsets(position, grad_stride_h, grad_stride_w, WIDTH, FLAT)
        tl.store(grad_plane + offsets[None, :], grad, mask=mask)
    return grad_p


@jit
def stripe_pool_backward_kernel(
    grad_global_ptr, grad_local_ptr, map_ptr, global_ptr, local_ptr, p_ptr, grad_map_ptr, grad_p_ptr,
    eps, channels, map_stride_0, map_stride_1, map_stride_2, map_stride_3,
    grad_map_stride_0, grad_map_stride_1, grad_map_stride_2, grad_map_stride_3,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIPES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Backward: one program for each sample and BLOCK_C channels, rows in the order of the forward.

    grad_global_ptr, global_ptr: (B, C) float32, contiguous; the gradient is None if no loss needs it
    grad_local_ptr, local_ptr: (B, n, C) float32, contiguous; the same
    map_ptr: (B, C, H, W), any strides; not read for average pooling
    p_ptr: 0-d float32; None for average pooling
    grad_map_ptr: (B, C, H, W), any strides, the result
    grad_p_ptr: (programs,) float32, each program's share of dp; None for average pooling
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < channels
    channel = channel.to(tl.int64)
    p = None
    if p_ptr is not None:
        p = tl.load(p_ptr)
    plane = map_ptr + sample * map_stride_0 + channel[:, None] * map_stride_1
    grad_plane = grad_map_ptr + sample * grad_map_stride_0 + channel[:, None] * grad_map_stride_1
    grad_p = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    grad_global, log_global = load_feature(
        grad_global_ptr, global_ptr, sample * channels + channel, channel_mask, HEIGHT * WIDTH, p
    )
    grad_stripe, log_stripe = load_feature(
        grad_local_ptr, local_ptr, sample * STRIPES * channels + channel, channel_mask,
        tl.cdiv(HEIGHT, STRIPES) * WIDTH, p,
    )  # fmt: skip
    first = 0
    for stripe in range(STRIPES):
        next_stripe = tl.minimum(stripe + 1, STRIPES - 1)
        next_top = (stripe + 1) * HEIGHT // STRIPES
        bottom = ((stripe + 1) * HEIGHT + STRIPES - 1) // STRIPES
        next_rows = ((next_stripe + 1) * HEIGHT + STRIPES - 1) // STRIPES - next_stripe * HEIGHT // STRIPES
        grad_next_stripe, log_next_stripe = load_feature(
            grad_local_ptr, local_ptr, (sample * STRIPES + next_stripe) * channels + channel, channel_mask,
            next_rows * WIDTH, p,
        )  # fmt: skip
        grad_p = write_rows(
            plane, grad_plane, p, eps, grad_p, channel_mask, first, next_top,
            grad_global, log_global, grad_stripe, log_stripe, None, None,
            map_stride_2, map_stride_3, grad_map_stride_2, grad_map_stride_3, WIDTH, FLAT, BLOCK_S,
        )  # fmt: skip
        if HEIGHT % STRIPES != 0:
            grad_p = write_rows(
                plane, grad_plane, p, eps, grad_p, channel_mask, next_top, bottom,
                grad_global, log_global, grad_stripe, log_stripe, grad_next_stripe, log_next_stripe,
                map_stride_2, map_stride_3, grad_map_stride_2, grad_map_stride_3, WIDTH, FLAT, BLOCK_S,
            )  # fmt: skip
        grad_stripe, log_stripe = grad_next_stripe, log_next_stripe
        first = bottom
    if p is not None:
        ln_2 = 0.6931471805599453
        tl.store(grad_p_ptr + tl.program_id(0), tl.sum(tl.sum(grad_p, axis=1), axis=0) * ln_2 / p)


def map_constants(stripes: int, *maps: Tensor) -> dict[str, int | bool]:
    """HEIGHT, WIDTH, STRIPES, and FLAT: whether in each map (B, C, H, W) a row follows the row above it."""
    height, width = maps[0].shape[2:]
    flat = all(x.stride(2) == width * x.stride(3) for x in maps)
    return {"HEIGHT": height, "WIDTH": width, "STRIPES": stripes, "FLAT": flat}


def prepare(tiles: Tiles, stripes: int, eps: float, *maps: Tensor) -> tuple[int, Tiles, dict[str, Any]]:
    """Programs, tiles and scalars of a pass over maps (B, C, H, W)."""
    batch, channels = maps[0].shape[:2]
    programs = batch * cdiv(channels, tiles["BLOCK_C"])
    return programs, tiles, {"eps": eps, "channels": channels, **map_constants(stripes, *maps)}


def launch_forward(
    plan: Plan, feature_map: Tensor, stripes: int, p: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Global (B, C) and local (B, n, C) features, float32."""
    batch, channels = feature_map.shape[:2]
    global_feature = feature_map.new_empty((batch, channels), dtype=torch.float32)
    local_features = feature_map.new_empty((batch, stripes, channels), dtype=torch.float32)
    plan.launch(
        stripe_pool_kernel, {"map": feature_map, "p": p, "global": global_feature, "local": local_features},
        lambda: prepare(POOL[contiguous_axis(feature_map)], stripes, eps, feature_map),
    )  # fmt: skip
    return global_feature, local_features


def launch_backward(
    plan: Plan, grad_global: Tensor | None, grad_local: Tensor | None, feature_map: Tensor,
    global_feature: Tensor | None, local_features: Tensor, p: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of the map, and of p (0-d float32; 0 for average pooling)."""
    grad_map = torch.empty_like(feature_map)
    tiles = POOL_BACKWARD[contiguous_axis(feature_map)]
    grad_p = None
    if p is not None:
        grad_p = feature_map.new_empty(
            len(feature_map) * cdiv(feature_map.shape[1], tiles["BLOCK_C"]), dtype=torch.float32
        )
    plan.launch(
        stripe_pool_backward_kernel,
        {
            "grad_global": None if grad_global is None else grad_global.contiguous(),
            "grad_local": None if grad_local is None else grad_local.contiguous(),
            "map": feature_map, "global": global_feature, "local": local_features, "p": p, "grad_map": grad_map,
            "grad_p": grad_p,
        },
        lambda: prepare(tiles, local_features.shape[1], eps, feature_map, grad_map),
    )  # fmt: skip
    return grad_map, feature_map.new_zeros((), dtype=torch.float32) if grad_p is None else grad_p.sum()

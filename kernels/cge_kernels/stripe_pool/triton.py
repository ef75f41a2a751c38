"""The kernels of stripe_pool, and their launches; op.py has the formulas.

A program owns one sample and BLOCK_C channels. It walks down the rows: those of one stripe alone, then the row that the
stripe shares with the next one (where n does not divide H), so that each element is loaded, and its gradient stored,
exactly once; the global sum comes from the same loads.
"""

import torch
from torch import Tensor

from cge_kernels.common.device_functions import jit, product, tl, triton
from cge_kernels.common.launch import launch
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
    map_pointer, p_pointer, eps, global_pointer, local_pointer, operand_pointer, squares_pointer,
    sample, tile, channels, tiles, squares_row, stride_b, stride_c, stride_h, stride_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIPES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Pools BLOCK_C channels of one sample.

    map (B, C, H, W), any strides; p 0-d float32 or None. Results, each where its pointer is not None: global (B, C),
    local (B, n, C) float32; operand (B, n, C), the local features in the matmul's dtype; squares (n, tiles,
    squares_row) float32, this tile's share of each local feature's squared length.
    """
    p = None
    if p_pointer is not None:
        p = tl.load(p_pointer)
    channel = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < channels
    plane = map_pointer + tl.cast(sample, tl.int64) * stride_b + channel.to(tl.int64)[:, None] * stride_c
    everything = tl.zeros([BLOCK_C], tl.float32)
    shared_with_previous = tl.zeros([BLOCK_C], tl.float32)
    first = 0
    for stripe in range(STRIPES):
        top = stripe * HEIGHT // STRIPES
        next_top = (stripe + 1) * HEIGHT // STRIPES
        bottom = ((stripe + 1) * HEIGHT + STRIPES - 1) // STRIPES
        own = sum_rows(plane, p, eps, channel_mask, first, next_top, stride_h, stride_w, WIDTH, FLAT, BLOCK_C, BLOCK_S)
        everything += own
        own += shared_with_previous
        if HEIGHT % STRIPES != 0:
            shared_with_previous = sum_rows(
                plane, p, eps, channel_mask, next_top, bottom, stride_h, stride_w, WIDTH, FLAT, BLOCK_C, BLOCK_S
            )
            everything += shared_with_previous
            own += shared_with_previous
        feature = root_of_mean(own, (bottom - top) * WIDTH, p)
        row = tl.cast(sample, tl.int64) * STRIPES + stripe
        tl.store(local_pointer + row * channels + channel, feature, mask=channel_mask)
        if operand_pointer is not None:
            tl.store(operand_pointer + row * channels + channel, feature, mask=channel_mask)
        if squares_pointer is not None:
            square = tl.sum(tl.where(channel_mask, product(feature, feature), 0.0), axis=0)
            tl.store(squares_pointer + tl.cast(stripe * tiles + tile, tl.int64) * squares_row + sample, square)
        first = bottom
    if global_pointer is not None:
        feature = root_of_mean(everything, HEIGHT * WIDTH, p)
        tl.store(global_pointer + tl.cast(sample, tl.int64) * channels + channel, feature, mask=channel_mask)


@jit
def stripe_pool_kernel(
    map_pointer, p_pointer, eps, global_pointer, local_pointer,
    channels, stride_b, stride_c, stride_h, stride_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIPES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Forward: one program for each sample and BLOCK_C channels; arguments as in pool_tile."""
    tiles = tl.cdiv(channels, BLOCK_C)
    pool_tile(
        map_pointer, p_pointer, eps, global_pointer, local_pointer, None, None,
        tl.program_id(0) // tiles, tl.program_id(0) % tiles, channels, tiles, 0, stride_b, stride_c, stride_h, stride_w,
        HEIGHT, WIDTH, STRIPES, FLAT, BLOCK_C, BLOCK_S,
    )  # fmt: skip


@jit
def load_feature(gradient_pointer, feature_pointer, offsets, mask, count, p):
    """(BLOCK_C, 1) gradient / count, 0 where the forward clamped the mean, and log2 of the feature (0 for average)."""
    gradient = tl.zeros_like(offsets).to(tl.float32)
    log_feature = gradient
    if gradient_pointer is not None:
        gradient = tl.load(gradient_pointer + offsets, mask=mask, other=0.0) / count
        if p is not None:
            log_feature = tl.log2(tl.load(feature_pointer + offsets, mask=mask, other=1.0))
            gradient = tl.where(p * log_feature <= LOG2_CLAMPED, 0.0, gradient)
    return gradient[:, None], log_feature[:, None]


@jit
def feature_share(gradient, log_feature, log_x, p):
    """A feature's share of dx, and the same times log2(x / f), for GeM."""
    log_ratio = log_x - log_feature
    share = gradient * tl.exp2((p - 1.0) * log_ratio)
    # 0 * inf where a feature takes no gradient
    share = tl.where(gradient == 0.0, 0.0, share)
    return share, tl.where(gradient == 0.0, 0.0, share * log_ratio)


@jit
def write_rows(
    plane, gradient_plane, p, eps, grad_p, channel_mask, first, end,
    everything, log_everything, stripe, log_stripe, following, log_following,
    stride_h, stride_w, gradient_stride_h, gradient_stride_w,
    WIDTH: tl.constexpr, FLAT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores dx of the rows first..end-1; returns the growing sum of p * dp / ln 2.

    everything, stripe, following: what load_feature gives for the global feature, the rows' stripe and, for a row that
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
            gradient, weighted = feature_share(everything, log_everything, log_x, p)
            share, weighted_share = feature_share(stripe, log_stripe, log_x, p)
            gradient += share
            weighted += weighted_share
            if following is not None:
                share, weighted_share = feature_share(following, log_following, log_x, p)
                gradient += share
                weighted += weighted_share
            grad_p += tl.where(mask, positive * weighted, 0.0)
            gradient = tl.where(x >= eps, gradient, 0.0)
        else:
            gradient = everything + stripe
            if following is not None:
                gradient += following
            gradient = tl.broadcast_to(gradient, mask.shape)
        offsets = position_offsets(position, gradient_stride_h, gradient_stride_w, WIDTH, FLAT)
        tl.store(gradient_plane + offsets[None, :], gradient, mask=mask)
    return grad_p


@jit
def stripe_pool_backward_kernel(
    grad_global_pointer, grad_local_pointer, map_pointer, global_pointer, local_pointer, p_pointer, eps,
    grad_map_pointer, grad_p_pointer,
    channels, stride_b, stride_c, stride_h, stride_w,
    gradient_stride_b, gradient_stride_c, gradient_stride_h, gradient_stride_w,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIPES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Backward: one program for each sample and BLOCK_C channels, rows in the order of the forward.

    grad_global, global (B, C), grad_local, local (B, n, C), float32, contiguous, the gradients None if no loss needs
    them; map, grad_map (B, C, H, W), any strides. For GeM only: p 0-d; grad_p (programs,) float32, each program's share
    of dp. For average pooling the map is not read.
    """
    tiles = tl.cdiv(channels, BLOCK_C)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    channel = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channel < channels
    channel = channel.to(tl.int64)
    p = None
    if p_pointer is not None:
        p = tl.load(p_pointer)
    plane = map_pointer + sample * stride_b + channel[:, None] * stride_c
    gradient_plane = grad_map_pointer + sample * gradient_stride_b + channel[:, None] * gradient_stride_c
    grad_p = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    everything, log_everything = load_feature(
        grad_global_pointer, global_pointer, sample * channels + channel, channel_mask, HEIGHT * WIDTH, p
    )
    stripe, log_stripe = load_feature(
        grad_local_pointer, local_pointer, sample * STRIPES * channels + channel, channel_mask,
        tl.cdiv(HEIGHT, STRIPES) * WIDTH, p,
    )  # fmt: skip
    first = 0
    for index in range(STRIPES):
        following_index = tl.minimum(index + 1, STRIPES - 1)
        next_top = (index + 1) * HEIGHT // STRIPES
        bottom = ((index + 1) * HEIGHT + STRIPES - 1) // STRIPES
        following_bottom = ((following_index + 1) * HEIGHT + STRIPES - 1) // STRIPES
        following_top = following_index * HEIGHT // STRIPES
        following, log_following = load_feature(
            grad_local_pointer, local_pointer, (sample * STRIPES + following_index) * channels + channel, channel_mask,
            (following_bottom - following_top) * WIDTH, p,
        )  # fmt: skip
        grad_p = write_rows(
            plane, gradient_plane, p, eps, grad_p, channel_mask, first, next_top,
            everything, log_everything, stripe, log_stripe, None, None,
            stride_h, stride_w, gradient_stride_h, gradient_stride_w, WIDTH, FLAT, BLOCK_S,
        )  # fmt: skip
        if HEIGHT % STRIPES != 0:
            grad_p = write_rows(
                plane, gradient_plane, p, eps, grad_p, channel_mask, next_top, bottom,
                everything, log_everything, stripe, log_stripe, following, log_following,
                stride_h, stride_w, gradient_stride_h, gradient_stride_w, WIDTH, FLAT, BLOCK_S,
            )  # fmt: skip
        stripe, log_stripe = following, log_following
        first = bottom
    if p is not None:
        ln_2 = 0.6931471805599453
        tl.store(grad_p_pointer + tl.program_id(0), tl.sum(tl.sum(grad_p, axis=1), axis=0) * ln_2 / p)


def is_flat(*tensors: Tensor) -> bool:
    """Whether in each map (B, C, H, W) a row follows the row above it at the distance of its positions."""
    return all(tensor.stride(2) == tensor.shape[3] * tensor.stride(3) for tensor in tensors)


def strides(prefix: str, feature_map: Tensor) -> dict[str, int]:
    """The map's strides as the kernels name them."""
    return {f"{prefix}stride_{axis}": stride for axis, stride in zip("bchw", feature_map.stride(), strict=True)}


def launch_forward(feature_map: Tensor, stripes: int, p: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Global (B, C) and local (B, n, C) features, float32."""
    batch, channels, height, width = feature_map.shape
    global_feature = feature_map.new_empty(batch, channels, dtype=torch.float32)
    local_features = feature_map.new_empty(batch, stripes, channels, dtype=torch.float32)
    chosen = POOL[contiguous_axis(feature_map)]
    args = {
        "map_pointer": feature_map,
        "p_pointer": p,
        "eps": eps,
        "global_pointer": global_feature,
        "local_pointer": local_features,
        "channels": channels,
        **strides("", feature_map),
    }
    constants = {"HEIGHT": height, "WIDTH": width, "STRIPES": stripes, "FLAT": is_flat(feature_map), **chosen.blocks}
    grid = (batch * cdiv(channels, chosen.blocks["BLOCK_C"]),)
    launch(stripe_pool_kernel, grid, args, constants, chosen.options)
    return global_feature, local_features


def launch_backward(
    grad_global: Tensor | None,
    grad_local: Tensor | None,
    feature_map: Tensor,
    global_feature: Tensor | None,
    local_features: Tensor,
    p: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradient of the map, and of p (0-d float32; 0 for average pooling)."""
    batch, channels, height, width = feature_map.shape
    stripes = local_features.shape[1]
    grad_map = torch.empty_like(feature_map)
    chosen = POOL_BACKWARD[contiguous_axis(feature_map)]
    programs = batch * cdiv(channels, chosen.blocks["BLOCK_C"])
    grad_p = None if p is None else feature_map.new_empty(programs, dtype=torch.float32)
    args = {
        "grad_global_pointer": None if grad_global is None else grad_global.contiguous(),
        "grad_local_pointer": None if grad_local is None else grad_local.contiguous(),
        "map_pointer": feature_map,
        "global_pointer": global_feature,
        "local_pointer": local_features,
        "p_pointer": p,
        "eps": eps,
        "grad_map_pointer": grad_map,
        "grad_p_pointer": grad_p,
        "channels": channels,
        **strides("", feature_map),
        **strides("gradient_", grad_map),
    }
    flat = is_flat(feature_map, grad_map)
    constants = {"HEIGHT": height, "WIDTH": width, "STRIPES": stripes, "FLAT": flat, **chosen.blocks}
    launch(stripe_pool_backward_kernel, (programs,), args, constants, chosen.options)
    return grad_map, feature_map.new_zeros((), dtype=torch.float32) if grad_p is None else grad_p.sum()

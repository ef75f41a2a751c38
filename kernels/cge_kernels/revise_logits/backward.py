"""The backward kernels of revise_logits; revise_logits.py has the formulas.

grad_scores, elementwise: a program owns BLOCK_B samples x BLOCK_N classes, of all stripes. grad_local, the matmul over
classes: a program owns BLOCK_B samples x BLOCK_C channels of one stripe.
"""

import torch
from torch import Tensor

from cge_kernels.common.device_functions import jit, product, tl
from cge_kernels.common.dispatch import implementation
from cge_kernels.common.launch import current_target, float32_precision, launch
from cge_kernels.common.tiles import (
    GRAD_SCORES,
    cdiv,
    chunk_of_classes,
    grad_local_configuration,
    next_power_of_2,
    score_row,
)
from cge_kernels.revise_logits import cpu
from cge_kernels.revise_logits.forward import MAX_PARTS, NORM_EPS, dot, launch_revise, log_sigmoid, prepare, sum_parts


@jit
def grad_scores_kernel(
    grad_pointer, logits_pointer, scores_pointer, grad_logits_pointer, grad_scores_pointer, projection_pointer,
    batch, classes, grad_stride_b, grad_stride_k, logits_stride_b, logits_stride_k, grad_logits_stride_b, score_row,
    first_tile, projection_tiles, projection_row,
    STRIPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Backward, elementwise: one program for BLOCK_B samples x BLOCK_N classes.

    grad, logits (B, N), any strides; scores (n, B, score_row) float32 -> grad_logits (B, N), classes contiguous; and
    unless None, grad_scores (n, B, score_row) in the matmul's dtype, 0 beyond N, and projection (n, tiles,
    projection_row) float32, whose row first_tile + tile takes this tile's share of <ds_i, s_i>.
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    class_tile = tl.program_id(0) // batch_tiles
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    sample_mask = sample < batch
    mask = sample_mask[:, None] & (identity < classes)[None, :]
    inside = sample_mask[:, None] & (identity < score_row)[None, :]
    score_offsets = sample[:, None] * score_row + identity[None, :]
    stripe_stride = tl.cast(batch, tl.int64) * score_row
    log_weight = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for stripe in range(STRIPES):
        log_weight += log_sigmoid(
            tl.load(scores_pointer + stripe * stripe_stride + score_offsets, mask=inside, other=0.0)
        )
    weight = tl.exp(log_weight / STRIPES)
    wide = identity.to(tl.int64)[None, :]
    grad = tl.load(grad_pointer + sample[:, None] * grad_stride_b + wide * grad_stride_k, mask=mask, other=0.0)
    grad_logit = grad.to(tl.float32) * weight
    tl.store(grad_logits_pointer + sample[:, None] * grad_logits_stride_b + wide, grad_logit, mask=mask)
    if grad_scores_pointer is not None:
        logit = tl.load(
            logits_pointer + sample[:, None] * logits_stride_b + wide * logits_stride_k, mask=mask, other=0.0
        )
        grad_log_weight = grad_logit * logit.to(tl.float32) / STRIPES
        for stripe in range(STRIPES):
            score = tl.load(scores_pointer + stripe * stripe_stride + score_offsets, mask=inside, other=0.0)
            grad_score = grad_log_weight / (1.0 + tl.exp(score))
            tl.store(grad_scores_pointer + stripe * stripe_stride + score_offsets, grad_score, mask=inside)
            share = tl.sum(product(grad_score, score), axis=1)
            part = tl.cast(stripe * projection_tiles + first_tile + class_tile, tl.int64)
            tl.store(projection_pointer + part * projection_row + sample, share, mask=sample_mask)


@jit
def grad_local_kernel(
    grad_scores_pointer, memory_pointer, earlier_pointer, local_pointer, scale_pointer, projection_pointer,
    grad_local_pointer, batch, classes, channels, memory_stride_i,
    local_stride_b, local_stride_i, local_stride_c, score_row, projection_tiles, projection_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Backward, matmul over classes: one program for BLOCK_B samples x BLOCK_C channels of one stripe.

    grad_scores (n, B, score_row) and memory (n, N, C), the operands; earlier (B, n, C) float32, the sum over the chunks
    of classes before this one, or None; grad_local (B, n, C). After the last chunk, whose local (B, n, C) is not None,
    the sum goes through the normalisation: scale (n, B), projection (n, tiles, projection_row).
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    stripe = tl.program_id(0) // batch_tiles % STRIPES
    channel = tl.program_id(0) // batch_tiles // STRIPES * BLOCK_C + tl.arange(0, BLOCK_C)
    sample_mask = sample < batch
    channel_mask = channel < channels
    mask = sample_mask[:, None] & channel_mask[None, :]
    block = tl.arange(0, BLOCK_K)
    gradient_rows = grad_scores_pointer + (tl.cast(stripe, tl.int64) * batch + sample)[:, None] * score_row
    memory_columns = memory_pointer + tl.cast(stripe, tl.int64) * memory_stride_i + channel[None, :]
    accumulator = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, classes, BLOCK_K):
        identity = start + block
        # grad_scores are 0 between N and the end of the row
        gradients = tl.load(
            gradient_rows + identity[None, :], mask=sample_mask[:, None] & (identity < score_row)[None, :], other=0.0
        )
        rows = tl.load(
            memory_columns + identity.to(tl.int64)[:, None] * channels,
            mask=(identity < classes)[:, None] & channel_mask[None, :],
            other=0.0,
        )
        accumulator = dot(gradients, rows, accumulator, PRECISION)
    result_offsets = (sample * STRIPES + stripe)[:, None] * channels + channel[None, :]
    if earlier_pointer is not None:
        accumulator += tl.load(earlier_pointer + result_offsets, mask=mask, other=0.0)
    if local_pointer is not None:
        projection = sum_parts(
            projection_pointer, projection_row, sample, sample_mask, stripe, projection_tiles, BLOCK_B, BLOCK_PARTS
        )
        scale = tl.load(scale_pointer + stripe * batch + sample, mask=sample_mask, other=0.0)
        # Below the bound the length is a constant: nothing to project out.
        projection = tl.where(scale * NORM_EPS < 0.999999, projection * scale, 0.0)
        wide = channel.to(tl.int64)[None, :]
        local_offsets = sample[:, None] * local_stride_b + stripe * local_stride_i + wide * local_stride_c
        local = tl.load(local_pointer + local_offsets, mask=mask, other=0.0).to(tl.float32)
        accumulator = (accumulator - local * projection[:, None]) * scale[:, None]
    tl.store(grad_local_pointer + result_offsets, accumulator, mask=mask)


def launch_grad_scores(
    grad: Tensor, logits: Tensor, scores: Tensor, grad_logits: Tensor, grad_scores: Tensor | None,
    projection: Tensor | None, first_tile: int,
) -> None:  # fmt: skip
    """Fills grad_logits (B, N), grad_scores (n, B, score_row) and rows of projection (n, tiles, at least B)."""
    batch, classes = logits.shape
    chosen = GRAD_SCORES
    args = {
        "grad_pointer": grad,
        "logits_pointer": logits,
        "scores_pointer": scores,
        "grad_logits_pointer": grad_logits,
        "grad_scores_pointer": grad_scores,
        "projection_pointer": projection,
        "batch": batch,
        "classes": classes,
        "grad_stride_b": grad.stride(0),
        "grad_stride_k": grad.stride(1),
        "logits_stride_b": logits.stride(0),
        "logits_stride_k": logits.stride(1),
        "grad_logits_stride_b": grad_logits.stride(0),
        "score_row": scores.shape[2],
        "first_tile": first_tile,
        "projection_tiles": 0 if projection is None else projection.shape[1],
        "projection_row": 0 if projection is None else projection.shape[2],
    }
    tiles = cdiv(batch, chosen.blocks["BLOCK_B"]) * cdiv(scores.shape[2], chosen.blocks["BLOCK_N"])
    launch(grad_scores_kernel, (tiles,), args, {"STRIPES": scores.shape[0], **chosen.blocks}, chosen.options)


def launch_grad_local(
    grad_scores: Tensor, memory: Tensor, earlier: Tensor | None, local_features: Tensor | None, scale: Tensor,
    projection: Tensor, grad_local: Tensor,
) -> None:  # fmt: skip
    """Fills grad_local (B, n, C): the sum over classes so far or, where local_features is not None, the gradient."""
    batch, stripes, channels = grad_local.shape
    target = current_target(grad_local)
    chosen = grad_local_configuration(target, memory.dtype, batch, channels * stripes)
    args = {
        "grad_scores_pointer": grad_scores,
        "memory_pointer": memory,
        "earlier_pointer": earlier,
        "local_pointer": local_features,
        "scale_pointer": scale,
        "projection_pointer": projection,
        "grad_local_pointer": grad_local,
        "batch": batch,
        "classes": memory.shape[1],
        "channels": channels,
        "memory_stride_i": memory.stride(0),
        "local_stride_b": 0 if local_features is None else local_features.stride(0),
        "local_stride_i": 0 if local_features is None else local_features.stride(1),
        "local_stride_c": 0 if local_features is None else local_features.stride(2),
        "score_row": grad_scores.shape[2],
        "projection_tiles": projection.shape[1],
        "projection_row": projection.shape[2],
    }
    constants = {
        "STRIPES": stripes,
        "PRECISION": float32_precision(target),
        "BLOCK_PARTS": min(MAX_PARTS, next_power_of_2(projection.shape[1])),
        **chosen.blocks,
    }
    tiles = cdiv(batch, chosen.blocks["BLOCK_B"]) * stripes * cdiv(channels, chosen.blocks["BLOCK_C"])
    launch(grad_local_kernel, (tiles,), args, constants, chosen.options)


def launch_backward(
    grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, scale: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the logits (B, N) and of the local features (B, n, C), the latter empty without local_gradient."""
    stripes, classes, channels = memory.shape
    batch = logits.shape[0]
    kept = scores.shape[2] > 0
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not kept:
        operand, squares, _ = prepare(local_features, memory)
    chunk = score_row(classes) if kept else chunk_of_classes(batch, stripes, classes)
    tile = GRAD_SCORES.blocks["BLOCK_N"]
    starts = range(0, classes, chunk)
    grad_local = local_features.new_empty((batch, stripes, channels) if local_gradient else 0)
    sums, projection = None, None
    if local_gradient:
        sums = grad_local if len(starts) == 1 else grad_local.new_empty(grad_local.shape, dtype=torch.float32)
        tiles = sum(cdiv(min(chunk, score_row(classes) - start), tile) for start in starts)
        projection = logits.new_empty(stripes, tiles, score_row(batch), dtype=torch.float32)
    first_tile = 0
    for start in starts:
        part = slice(start, start + chunk)
        rows = memory[:, part]
        row = score_row(rows.shape[1])
        if not kept:
            scores = logits.new_empty(stripes, batch, row, dtype=torch.float32)
            launch_revise(None, operand, squares, rows, None, scores, None)
        grad_scores = scores.new_empty(scores.shape, dtype=memory.dtype) if local_gradient else None
        launch_grad_scores(
            grad[:, part], logits[:, part], scores, grad_logits[:, part], grad_scores, projection, first_tile
        )
        first_tile += cdiv(row, tile)
        if local_gradient:
            is_last = start == starts[-1]
            launch_grad_local(
                grad_scores,
                rows,
                sums if start else None,
                local_features if is_last else None,
                scale,
                projection,
                grad_local if is_last else sums,
            )
    return grad_logits, grad_local


@torch.library.custom_op("cge_kernels::revise_logits_backward", mutates_args=())
def revise_logits_backward_op(
    grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, scale: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return implementation(launch_backward, cpu.revise_logits_backward, logits, local_features, memory)(
        grad, logits, local_features, memory, scores, scale, local_gradient
    )


@revise_logits_backward_op.register_fake
def _(grad, logits, local_features, memory, scores, scale, local_gradient):
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        local_features.new_empty(local_features.shape if local_gradient else 0),
    )

"""The backward kernels of revise_logits and their launches; op.py has the formulas.

grad_scores, elementwise: a program owns BLOCK_B samples x BLOCK_N classes, of all stripes. grad_local, the matmul over
classes: a program owns BLOCK_B samples x BLOCK_C channels of one stripe.
"""

from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.budget import chunk_of_classes, score_row
from cge_kernels.common.device_functions import NORM_EPS, dot, jit, log_sigmoid, product, sum_parts, tl
from cge_kernels.common.launch import Tiles, current_target, float32_precision
from cge_kernels.common.plan import Plan, run
from cge_kernels.common.tiles import GRAD_SCORES, block_of_parts, cdiv, grad_local_tiles
from cge_kernels.revise_logits import cpu
from cge_kernels.revise_logits.forward import cast_and_norm, launch_revise


@jit
def grad_scores_kernel(
    grad_ptr, logits_ptr, scores_ptr, grad_logits_ptr, grad_scores_ptr, projection_ptr,
    batch, classes, grad_stride_0, grad_stride_1, logits_stride_0, logits_stride_1, grad_logits_stride_0,
    scores_stride_1, first_tile, projection_tiles, projection_stride_1,
    STRIPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Backward, elementwise: one program for BLOCK_B samples x BLOCK_N classes.

    grad_ptr, logits_ptr: (B, N), any strides
    scores_ptr: (n, B, row) float32
    Results, the last two unless None:
    grad_logits_ptr: (B, N), classes contiguous
    grad_scores_ptr: (n, B, row) in the matmul's dtype, 0 beyond N
    projection_ptr: (n, projection_tiles, at least B) float32; row first_tile + tile takes this tile's share of
        <ds_i, s_i>
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    class_tile = tl.program_id(0) // batch_tiles
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    sample_mask = sample < batch
    mask = sample_mask[:, None] & (identity < classes)[None, :]
    inside = sample_mask[:, None] & (identity < scores_stride_1)[None, :]
    score_offsets = sample[:, None] * scores_stride_1 + identity[None, :]
    stripe_stride = tl.cast(batch, tl.int64) * scores_stride_1
    log_weight = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for stripe in range(STRIPES):
        score = tl.load(scores_ptr + stripe * stripe_stride + score_offsets, mask=inside, other=0.0)
        log_weight += log_sigmoid(score)
    weight = tl.exp(log_weight / STRIPES)
    wide = identity.to(tl.int64)[None, :]
    grad = tl.load(grad_ptr + sample[:, None] * grad_stride_0 + wide * grad_stride_1, mask=mask, other=0.0)
    grad_logit = grad.to(tl.float32) * weight
    tl.store(grad_logits_ptr + sample[:, None] * grad_logits_stride_0 + wide, grad_logit, mask=mask)
    if grad_scores_ptr is not None:
        logit_offsets = sample[:, None] * logits_stride_0 + wide * logits_stride_1
        logit = tl.load(logits_ptr + logit_offsets, mask=mask, other=0.0)
        grad_log_weight = grad_logit * logit.to(tl.float32) / STRIPES
        for stripe in range(STRIPES):
            score = tl.load(scores_ptr + stripe * stripe_stride + score_offsets, mask=inside, other=0.0)
            grad_score = grad_log_weight / (1.0 + tl.exp(score))
            tl.store(grad_scores_ptr + stripe * stripe_stride + score_offsets, grad_score, mask=inside)
            share = tl.sum(product(grad_score, score), axis=1)
            part = tl.cast(stripe * projection_tiles + first_tile + class_tile, tl.int64)
            tl.store(projection_ptr + part * projection_stride_1 + sample, share, mask=sample_mask)


@jit
def grad_local_kernel(
    grad_scores_ptr, memory_ptr, earlier_ptr, local_ptr, inv_norm_ptr, projection_ptr,
    grad_local_ptr, batch, classes, channels, memory_stride_0,
    local_stride_0, local_stride_1, local_stride_2, grad_scores_stride_1, projection_tiles, projection_stride_1,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Backward, matmul over classes: one program for BLOCK_B samples x BLOCK_C channels of one stripe.

    grad_scores_ptr: (n, B, row), 0 between N and the end of the row
    memory_ptr: (n, N, C), in the same dtype
    earlier_ptr: (B, n, C) float32, the sum over the chunks of classes before this one, or None
    grad_local_ptr: (B, n, C), the result
    After the last chunk, whose local_ptr is not None, the sum goes through the normalisation:
    local_ptr: (B, n, C), any strides
    inv_norm_ptr: (n, B) float32
    projection_ptr: (n, projection_tiles, at least B) float32
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    stripe = tl.program_id(0) // batch_tiles % STRIPES
    channel = tl.program_id(0) // batch_tiles // STRIPES * BLOCK_C + tl.arange(0, BLOCK_C)
    sample_mask = sample < batch
    channel_mask = channel < channels
    mask = sample_mask[:, None] & channel_mask[None, :]
    block = tl.arange(0, BLOCK_K)
    gradient_rows = grad_scores_ptr + (tl.cast(stripe, tl.int64) * batch + sample)[:, None] * grad_scores_stride_1
    memory_columns = memory_ptr + tl.cast(stripe, tl.int64) * memory_stride_0 + channel[None, :]
    accumulator = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, classes, BLOCK_K):
        identity = start + block
        inside = sample_mask[:, None] & (identity < grad_scores_stride_1)[None, :]
        gradients = tl.load(gradient_rows + identity[None, :], mask=inside, other=0.0)
        rows = tl.load(
            memory_columns + identity.to(tl.int64)[:, None] * channels,
            mask=(identity < classes)[:, None] & channel_mask[None, :],
            other=0.0,
        )
        accumulator = dot(gradients, rows, accumulator, PRECISION)
    result_offsets = (sample * STRIPES + stripe)[:, None] * channels + channel[None, :]
    if earlier_ptr is not None:
        accumulator += tl.load(earlier_ptr + result_offsets, mask=mask, other=0.0)
    if local_ptr is not None:
        projection = sum_parts(
            projection_ptr, projection_stride_1, sample, sample_mask, stripe, projection_tiles, BLOCK_B, BLOCK_PARTS
        )
        inv_norm = tl.load(inv_norm_ptr + stripe * batch + sample, mask=sample_mask, other=0.0)
        # Below the bound the length is a constant: nothing to project out.
        projection = tl.where(inv_norm * NORM_EPS < 0.999999, projection * inv_norm, 0.0)
        wide = channel.to(tl.int64)[None, :]
        local_offsets = sample[:, None] * local_stride_0 + stripe * local_stride_1 + wide * local_stride_2
        local = tl.load(local_ptr + local_offsets, mask=mask, other=0.0).to(tl.float32)
        accumulator = (accumulator - local * projection[:, None]) * inv_norm[:, None]
    tl.store(grad_local_ptr + result_offsets, accumulator, mask=mask)


def launch_grad_scores(
    plan: Plan, grad: Tensor, logits: Tensor, scores: Tensor, grad_logits: Tensor, grad_scores: Tensor | None,
    projection: Tensor | None, first_tile: int,
) -> None:  # fmt: skip
    """Fills grad_logits (B, N), grad_scores (n, B, score_row) and rows of projection (n, tiles, at least B)."""

    def prepare() -> tuple[int, Tiles, dict[str, int]]:
        (batch, classes), tiles = logits.shape, 0 if projection is None else projection.shape[1]
        programs = cdiv(batch, GRAD_SCORES["BLOCK_B"]) * cdiv(scores.shape[2], GRAD_SCORES["BLOCK_N"])
        scalars: dict[str, Any] = {
            "batch": batch,
            "classes": classes,
            "first_tile": first_tile,
            "projection_tiles": tiles,
        }
        return programs, GRAD_SCORES, {**scalars, "STRIPES": scores.shape[0]}

    plan.launch(
        grad_scores_kernel,
        {
            "grad": grad, "logits": logits, "scores": scores, "grad_logits": grad_logits, "grad_scores": grad_scores,
            "projection": projection,
        },
        prepare,
    )  # fmt: skip


def launch_grad_local(
    plan: Plan, grad_scores: Tensor, memory: Tensor, earlier: Tensor | None, local_features: Tensor | None,
    inv_norm: Tensor, projection: Tensor, grad_local: Tensor,
) -> None:  # fmt: skip
    """Fills grad_local (B, n, C): the sum over classes so far or, where local_features is not None, the gradient."""

    def prepare() -> tuple[int, Tiles, dict[str, Any]]:
        (batch, stripes, channels), classes = grad_local.shape, memory.shape[1]
        target, parts = current_target(grad_local), projection.shape[1]
        tiles = grad_local_tiles(target, memory.dtype, batch, channels * stripes)
        programs = cdiv(batch, tiles["BLOCK_B"]) * stripes * cdiv(channels, tiles["BLOCK_C"])
        scalars: dict[str, Any] = {"batch": batch, "classes": classes, "channels": channels, "projection_tiles": parts}
        scalars |= {"PRECISION": float32_precision(target), "BLOCK_PARTS": block_of_parts(parts)}
        return programs, tiles, {**scalars, "STRIPES": stripes}

    plan.launch(
        grad_local_kernel,
        {
            "grad_scores": grad_scores, "memory": memory, "earlier": earlier, "local": local_features,
            "inv_norm": inv_norm, "projection": projection, "grad_local": grad_local,
        },
        prepare,
    )  # fmt: skip


def launch_backward(
    plan: Plan, grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, inv_norm: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the logits (B, N) and of the local features (B, n, C), the latter empty without local_gradient."""
    stripes, classes, channels = memory.shape
    batch = logits.shape[0]
    kept = scores.shape[2] > 0
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not kept:
        casts = cast_and_norm(plan, local_features, memory)
    chunk = score_row(classes) if kept else chunk_of_classes(batch, stripes, classes)
    tile = GRAD_SCORES["BLOCK_N"]
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
            launch_revise(plan, None, casts, rows, None, scores, None)
        grad_scores = scores.new_empty(scores.shape, dtype=memory.dtype) if local_gradient else None
        launch_grad_scores(
            plan, grad[:, part], logits[:, part], scores, grad_logits[:, part], grad_scores, projection, first_tile
        )
        first_tile += cdiv(row, tile)
        if local_gradient:
            is_last = start == starts[-1]
            launch_grad_local(
                plan,
                grad_scores,
                rows,
                sums if start else None,
                local_features if is_last else None,
                inv_norm,
                projection,
                grad_local if is_last else sums,
            )
    return grad_logits, grad_local


def revise_backward(
    grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, inv_norm: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = grad, logits, local_features, memory, scores, inv_norm, local_gradient
    return run("revise_logits_backward", launch_backward, cpu.revise_logits_backward, *arguments)


revise_logits_backward_op = torch.library.custom_op("cge_kernels::revise_logits_backward", mutates_args=())(
    revise_backward
)


@revise_logits_backward_op.register_fake
def _(grad, logits, local_features, memory, scores, inv_norm, local_gradient):
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        local_features.new_empty(local_features.shape if local_gradient else 0),
    )

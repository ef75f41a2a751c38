"""Local classification by cosine to a class memory (NLC) and revision of the global logits (GLR).

Forward   s_i = <f_i, M_i> / max(||f_i||, 1e-12);  log w = mean_i log sigmoid(s_i);  revised = p * w.
Backward  dp = g * w;  ds_i = g * p * w * (1 - sigmoid(s_i)) / n;
          df_i = (ds_i M_i - u_i * <ds_i, s_i>) / ||f_i||, u_i = f_i / ||f_i||: since s_i = <u_i, M_i>, the projection
          <u_i, ds_i M_i> is a sum over classes of numbers that are at hand.
Kernels: prepare (squared lengths, and the local features in the memory's dtype), revise (matmul, and in its epilogue
sigmoid, n-th root and revision; a program owns BLOCK_B samples x BLOCK_N classes of all stripes), and backwards
grad_scores (elementwise) and grad_local (matmul; a program owns BLOCK_B samples x BLOCK_C channels of one stripe).
The length is not summed beside the dot: the operand would be needed in registers too and leave its swizzled layout.
Saved for the backward: the inputs, 1 / ||f_i|| and, if CGE_SCRATCH_MB has room for them, the scores; else the
backward computes them again, chunk of classes by chunk, in that room.
"""

import torch
from torch import Tensor

from cge_kernels import aten
from cge_kernels.checks import accumulation_dtype, require_same_device, require_shape, require_tensor
from cge_kernels.configurations import (
    GRAD_SCORES,
    PREPARE,
    cdiv,
    chunk_of_classes,
    grad_local_configuration,
    next_power_of_2,
    revise_configuration,
    score_row,
    scores_are_kept,
)
from cge_kernels.dispatch import implementation
from cge_kernels.language import INTERPRETED, jit, product, tl, triton
from cge_kernels.launch import current_target, float32_precision, launch

NORM_EPS = tl.constexpr(1e-12) if triton else 1e-12  # lower bound of a local feature's length
MAX_PARTS = 8  # partial sums that are loaded at a time; below any BLOCK_N (see grad_local_configuration)


@jit
def prepare_kernel(
    local_pointer, operand_pointer, squares_pointer, batch, channels, parts, stride_b, stride_i, stride_c,
    operand_stride_b, operand_stride_i, operand_stride_c, squares_row,
    STRIPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_B samples x BLOCK_C channels of one stripe.

    local (B, n, C), any strides -> operand, the same in its own dtype and strides, or None; squares (n, parts,
    squares_row) float32, a part for each BLOCK_C channels.
    """
    part = tl.program_id(0) % parts
    stripe = tl.program_id(0) // parts % STRIPES
    sample = (tl.program_id(0) // parts // STRIPES * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    channel = (part * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask = (sample < batch)[:, None] & (channel < channels)[None, :]
    local_offsets = sample[:, None] * stride_b + stripe * stride_i + channel[None, :] * stride_c
    local = tl.load(local_pointer + local_offsets, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(product(local, local), axis=1)
    row = tl.cast(stripe * parts + part, tl.int64) * squares_row
    tl.store(squares_pointer + row + sample, squares, mask=sample < batch)
    if operand_pointer is not None:
        rows = operand_pointer + sample[:, None] * operand_stride_b + tl.cast(stripe, tl.int64) * operand_stride_i
        tl.store(rows + channel[None, :] * operand_stride_c, local, mask=mask)


@jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; the interpreter knows no bfloat16 product."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@jit
def sum_parts(parts_pointer, row, sample, sample_mask, stripe, parts, BLOCK_B: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """(BLOCK_B,) sums over the middle axis of (n, parts, row) float32, in a fixed order."""
    total = tl.zeros([BLOCK_PARTS, BLOCK_B], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        offsets = (stripe * parts + part).to(tl.int64)[:, None] * row + sample[None, :]
        mask = (part < parts)[:, None] & sample_mask[None, :]
        total += tl.load(parts_pointer + offsets, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@jit
def log_sigmoid(score):
    """For scores in [-1, 1], where exp neither overflows nor vanishes."""
    return -tl.log(1.0 + tl.exp(-score))


@jit
def revise_tile(
    logits_pointer, operand_pointer, squares_pointer, memory_pointer, revised_pointer, scores_pointer, scale_pointer,
    batch_tile, class_tile, batch, classes, channels, parts, logits_stride_b, logits_stride_k, memory_stride_i,
    operand_stride_b, operand_stride_i, operand_stride_c, squares_row, score_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores, weights and revised logits of BLOCK_N classes and BLOCK_B samples.

    logits (B, N), any strides; operand (B, n, C), any strides, and memory (n, N, C), the matmul's operands; squares
    (n, parts, squares_row) float32. Results, each where its pointer is not None: revised (B, N) in the logits' dtype;
    scores (n, B, score_row) float32, 0 beyond N; scale (n, B) float32, 1 / max(||f_i||, 1e-12). Classes are the tile's
    rows: a few fill a tensor core's instruction, and without tensor cores the lanes of a warp, side by side along
    the samples, share a memory row by broadcast.
    """
    sample = (batch_tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    sample_mask = sample < batch
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    class_mask = identity < classes
    identity_wide = identity.to(tl.int64)[:, None]
    block = tl.arange(0, BLOCK_K)
    log_weight = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for stripe in range(STRIPES):
        memory_rows = memory_pointer + tl.cast(stripe, tl.int64) * memory_stride_i + identity_wide * channels
        feature_columns = (
            operand_pointer + tl.cast(stripe, tl.int64) * operand_stride_i + sample[None, :] * operand_stride_b
        )
        accumulator = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        for start in range(0, channels, BLOCK_K):
            channel = start + block
            rows = tl.load(
                memory_rows + channel[None, :], mask=class_mask[:, None] & (channel < channels)[None, :], other=0.0
            )
            features = tl.load(
                feature_columns + channel.to(tl.int64)[:, None] * operand_stride_c,
                mask=(channel < channels)[:, None] & sample_mask[None, :],
                other=0.0,
            )
            accumulator = dot(rows, features, accumulator, PRECISION)
        squares = sum_parts(squares_pointer, squares_row, sample, sample_mask, stripe, parts, BLOCK_B, BLOCK_PARTS)
        scale = 1.0 / tl.maximum(tl.sqrt_rn(squares), NORM_EPS)
        if scale_pointer is not None:
            tl.store(scale_pointer + stripe * batch + sample, scale, mask=sample_mask & (class_tile == 0))
        score = accumulator * scale[None, :]
        if scores_pointer is not None:
            score_rows = (tl.cast(stripe, tl.int64) * batch + sample)[None, :] * score_row
            inside = (identity < score_row)[:, None] & sample_mask[None, :]
            tl.store(scores_pointer + score_rows + identity[:, None], score, mask=inside)
        log_weight += log_sigmoid(score)
    if revised_pointer is not None:
        mask = class_mask[:, None] & sample_mask[None, :]
        weight = tl.exp(log_weight / STRIPES)
        logit_offsets = sample[None, :] * logits_stride_b + identity_wide * logits_stride_k
        logit = tl.load(logits_pointer + logit_offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(revised_pointer + sample[None, :] * classes + identity_wide, logit * weight, mask=mask)


@jit
def revise_kernel(
    logits_pointer, operand_pointer, squares_pointer, memory_pointer, revised_pointer, scores_pointer, scale_pointer,
    batch, classes, channels, parts, logits_stride_b, logits_stride_k, memory_stride_i,
    operand_stride_b, operand_stride_i, operand_stride_c, squares_row, score_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Forward: one program for each tile; tiles of the same classes are neighbours, so that L2 serves the memory."""
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    revise_tile(
        logits_pointer, operand_pointer, squares_pointer, memory_pointer,
        revised_pointer, scores_pointer, scale_pointer,
        tl.program_id(0) % batch_tiles, tl.program_id(0) // batch_tiles,
        batch, classes, channels, parts, logits_stride_b, logits_stride_k, memory_stride_i,
        operand_stride_b, operand_stride_i, operand_stride_c, squares_row, score_row,
        STRIPES, PRECISION, BLOCK_PARTS, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip


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


def prepare(local_features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The matmul's operand (B, n, C) in the memory's dtype, and squares (n, parts, at least B).

    Tensor cores take features with C contiguous. Without them each lane reads the features of its own samples, and
    only with B contiguous (a row padded to 16) do they lie in different banks of the shared memory.
    """
    batch, stripes, channels = local_features.shape
    if memory.dtype == torch.float32 and float32_precision(current_target(memory)) == "ieee":
        operand = memory.new_empty(stripes, channels, score_row(batch))[:, :, :batch].permute(2, 0, 1)
    elif local_features.dtype == memory.dtype and local_features.stride(2) == 1:
        operand = local_features
    else:
        operand = memory.new_empty(batch, stripes, channels)
    chosen = PREPARE
    parts = cdiv(channels, chosen.blocks["BLOCK_C"])
    squares = local_features.new_empty(stripes, parts, score_row(batch), dtype=torch.float32)
    args = {
        "local_pointer": local_features,
        "operand_pointer": None if operand is local_features else operand,
        "squares_pointer": squares,
        "batch": batch,
        "channels": channels,
        "parts": parts,
        "stride_b": local_features.stride(0),
        "stride_i": local_features.stride(1),
        "stride_c": local_features.stride(2),
        "operand_stride_b": operand.stride(0),
        "operand_stride_i": operand.stride(1),
        "operand_stride_c": operand.stride(2),
        "squares_row": squares.shape[2],
    }
    programs = cdiv(batch, chosen.blocks["BLOCK_B"]) * stripes * parts
    launch(prepare_kernel, (programs,), args, {"STRIPES": stripes, **chosen.blocks}, chosen.options)
    return operand, squares


def launch_revise(
    logits: Tensor | None, operand: Tensor, squares: Tensor, memory: Tensor, revised: Tensor | None,
    scores: Tensor | None, scale: Tensor | None,
) -> None:  # fmt: skip
    """Fills revised (B, N), scores (n, B, score_row) and scale (n, B), each unless None."""
    batch, stripes, channels = operand.shape
    classes, parts = memory.shape[1], squares.shape[1]
    target = current_target(operand)
    chosen = revise_configuration(target, memory.dtype, batch, classes)
    args = {
        "logits_pointer": logits,
        "operand_pointer": operand,
        "squares_pointer": squares,
        "memory_pointer": memory,
        "revised_pointer": revised,
        "scores_pointer": scores,
        "scale_pointer": scale,
        "batch": batch,
        "classes": classes,
        "channels": channels,
        "parts": parts,
        "logits_stride_b": 0 if logits is None else logits.stride(0),
        "logits_stride_k": 0 if logits is None else logits.stride(1),
        "memory_stride_i": memory.stride(0),
        "operand_stride_b": operand.stride(0),
        "operand_stride_i": operand.stride(1),
        "operand_stride_c": operand.stride(2),
        "squares_row": squares.shape[2],
        "score_row": 0 if scores is None else scores.shape[2],
    }
    constants = {
        "STRIPES": stripes,
        "PRECISION": float32_precision(target),
        "BLOCK_PARTS": min(MAX_PARTS, next_power_of_2(parts)),
        **chosen.blocks,
    }
    tiles = cdiv(batch, chosen.blocks["BLOCK_B"]) * cdiv(classes, chosen.blocks["BLOCK_N"])
    launch(revise_kernel, (tiles,), args, constants, chosen.options)


def launch_forward(logits: Tensor, local_features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Revised logits (B, N), scores (n, B, score_row) or (n, B, 0) if they are not kept, scale (n, B)."""
    stripes, classes, _ = memory.shape
    batch = local_features.shape[0]
    operand, squares = prepare(local_features, memory)
    revised = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row = score_row(classes) if scores_are_kept(local_features, memory) else 0
    scores = logits.new_empty(stripes, batch, row, dtype=torch.float32)
    scale = logits.new_empty(stripes, batch, dtype=torch.float32)
    launch_revise(logits, operand, squares, memory, revised, scores if row else None, scale)
    return revised, scores, scale


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
        operand, squares = prepare(local_features, memory)
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


@torch.library.custom_op("cge_kernels::revise_logits", mutates_args=())
def revise_logits_op(
    logits: Tensor, local_features: Tensor, memory: Tensor, local_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(launch_forward, aten.revise_logits, logits, local_features, memory)(
        logits, local_features, memory
    )


@revise_logits_op.register_fake
def _(logits, local_features, memory, local_gradient):
    batch, stripes, _ = local_features.shape
    dtype = accumulation_dtype(local_features, memory)
    row = score_row(memory.shape[1]) if scores_are_kept(local_features, memory) else 0
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        logits.new_empty(stripes, batch, row, dtype=dtype),
        logits.new_empty(stripes, batch, dtype=dtype),
    )


@torch.library.custom_op("cge_kernels::revise_logits_backward", mutates_args=())
def revise_logits_backward_op(
    grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, scale: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return implementation(launch_backward, aten.revise_logits_backward, logits, local_features, memory)(
        grad, logits, local_features, memory, scores, scale, local_gradient
    )


@revise_logits_backward_op.register_fake
def _(grad, logits, local_features, memory, scores, scale, local_gradient):
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        local_features.new_empty(local_features.shape if local_gradient else 0),
    )


def setup_context(ctx, inputs, output) -> None:
    logits, local_features, memory, ctx.local_gradient = inputs
    _, scores, scale = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, local_features, memory, scores, scale)


def backward(ctx, grad, _grad_scores, _grad_scale):
    if grad is None:
        return None, None, None, None
    local_gradient = ctx.local_gradient and ctx.needs_input_grad[1]
    grad_logits, grad_local = revise_logits_backward_op(grad, *ctx.saved_tensors, local_gradient)
    return grad_logits, grad_local if local_gradient else None, None, None


revise_logits_op.register_autograd(backward, setup_context=setup_context)


def check_memory(name: str, memory: Tensor) -> None:
    """Raises unless `memory` is a contiguous floating tensor (n, N, C)."""
    require_tensor(name, memory, "(n, N, C)")
    if 0 in memory.shape:
        raise ValueError(f"{name} must have no empty dimension, got {tuple(memory.shape)}")
    if not memory.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {memory.stride()} for shape {tuple(memory.shape)}")


def check_revision(logits: Tensor, local_features: Tensor, memory: Tensor) -> None:
    """Raises as `revise_logits` says."""
    require_tensor("logits", logits, "(B, N)")
    require_tensor("local_features", local_features, "(B, n, C)")
    check_memory("memory", memory)
    require_same_device(logits=logits, local_features=local_features, memory=memory)
    batch, stripes, channels = local_features.shape
    classes = memory.shape[1]
    require_shape("memory", memory, (stripes, classes, channels), f"local_features {(batch, stripes, channels)}")
    require_shape("logits", logits, (batch, classes), f"local_features and memory {tuple(memory.shape)}")


def revise_logits(logits: Tensor, local_features: Tensor, memory: Tensor, local_gradient: bool = True) -> Tensor:
    """Multiplies the global logits by what the local classifiers think of each class (the paper's module GLR).

    s_i[k] = <f_i, M[i,k]> / max(||f_i||, 1e-12);  w = (prod_i sigmoid(s_i))^(1/n);  revised = logits * w.
    The operands of the product are cast to the memory's dtype; sums are float32 (float64 if an argument is). float32
    products follow torch.get_float32_matmul_precision().

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
    check_revision(logits, local_features, memory)
    return revise_logits_op(logits, local_features, memory, local_gradient)[0]

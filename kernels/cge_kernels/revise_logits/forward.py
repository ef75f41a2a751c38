"""The forward kernels of revise_logits: scores, weights and revised logits; revise_logits.py has the formulas.

prepare: a program owns BLOCK_B samples x BLOCK_C channels of one stripe. revise, the matmul with sigmoid, n-th root and
revision in its epilogue: a program owns BLOCK_N classes x BLOCK_B samples, of all stripes.
"""

import torch
from torch import Tensor

from cge_kernels.common.device_functions import INTERPRETED, jit, product, tl, triton
from cge_kernels.common.launch import current_target, float32_precision, launch
from cge_kernels.common.tiles import (
    PREPARE,
    cdiv,
    next_power_of_2,
    revise_configuration,
    score_row,
    scores_are_kept,
)

NORM_EPS = tl.constexpr(1e-12) if triton else 1e-12  # lower bound of a local feature's length
MAX_PARTS = 8  # partial sums that are loaded at a time; below any BLOCK_N (see grad_local_configuration)


@jit
def prepare_kernel(
    local_pointer, operand_pointer, squares_pointer, features_pointer, feature_operand_pointer,
    batch, channels, parts, stride_b, stride_i, stride_c, operand_stride_b, operand_stride_i, operand_stride_c,
    squares_row, feature_channels, feature_stride_b, feature_stride_c, feature_operand_stride_b,
    feature_operand_stride_c,
    STRIPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_B samples x BLOCK_C channels of one stripe, or of the features, which come last.

    local (B, n, C), any strides -> operand, the same in its own dtype and strides, or None; squares (n, parts,
    squares_row) float32, a part for each BLOCK_C channels. features (B, C'), any strides -> feature_operand, or None.
    """
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    if feature_operand_pointer is not None:
        stripe = tile % (STRIPES + 1)
        tile = tile // (STRIPES + 1)
    else:
        stripe = tile % STRIPES
        tile = tile // STRIPES
    sample = (tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    channel = (part * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    sample_mask = sample < batch
    if stripe < STRIPES:
        mask = sample_mask[:, None] & (channel < channels)[None, :]
        local_offsets = sample[:, None] * stride_b + stripe * stride_i + channel[None, :] * stride_c
        local = tl.load(local_pointer + local_offsets, mask=mask, other=0.0).to(tl.float32)
        squares = tl.sum(product(local, local), axis=1)
        row = tl.cast(stripe * parts + part, tl.int64) * squares_row
        tl.store(squares_pointer + row + sample, squares, mask=sample_mask)
        if operand_pointer is not None:
            rows = operand_pointer + sample[:, None] * operand_stride_b + tl.cast(stripe, tl.int64) * operand_stride_i
            tl.store(rows + channel[None, :] * operand_stride_c, local, mask=mask)
    elif feature_operand_pointer is not None:
        mask = sample_mask[:, None] & (channel < feature_channels)[None, :]
        offsets = sample[:, None] * feature_stride_b + channel[None, :] * feature_stride_c
        features = tl.load(features_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = sample[:, None] * feature_operand_stride_b + channel[None, :] * feature_operand_stride_c
        tl.store(feature_operand_pointer + offsets, features, mask=mask)


@jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; the interpreter knows no bfloat16 product."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@jit
def multiply(
    rows_pointer, columns_pointer, row_mask, column_mask, depth, column_stride, accumulator,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """accumulator (rows, columns) + rows @ columns, over a common axis of length depth.

    rows_pointer (rows, 1) and columns_pointer (1, columns) point to their first numbers; the numbers of a row are
    contiguous, those of a column column_stride apart. Rows are converted to the columns' dtype.
    """
    block = tl.arange(0, BLOCK_K)
    for start in range(0, depth, BLOCK_K):
        channel = start + block
        inside = channel < depth
        rows = tl.load(rows_pointer + channel[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        columns = tl.load(
            columns_pointer + channel.to(tl.int64)[:, None] * column_stride,
            mask=inside[:, None] & column_mask[None, :],
            other=0.0,
        )
        accumulator = dot(rows.to(columns.dtype), columns, accumulator, PRECISION)
    return accumulator


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
    log_weight = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for stripe in range(STRIPES):
        memory_rows = memory_pointer + tl.cast(stripe, tl.int64) * memory_stride_i + identity_wide * channels
        feature_columns = (
            operand_pointer + tl.cast(stripe, tl.int64) * operand_stride_i + sample[None, :] * operand_stride_b
        )
        accumulator = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        accumulator = multiply(
            memory_rows, feature_columns, class_mask, sample_mask, channels, operand_stride_c, accumulator,
            PRECISION, BLOCK_K,
        )  # fmt: skip
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


def operand_of(features: Tensor, memory: Tensor) -> Tensor:
    """Where the matmul's operand (B, n, C) goes, in the memory's dtype; `features` themselves if they can be it.

    Tensor cores take features with C contiguous. Without them each lane reads the features of its own samples, and
    only with B contiguous (a row padded to 16) do they lie in different banks of the shared memory.
    """
    batch, stripes, channels = features.shape
    if memory.dtype == torch.float32 and float32_precision(current_target(memory)) == "ieee":
        return memory.new_empty(stripes, channels, score_row(batch))[:, :, :batch].permute(2, 0, 1)
    if features.dtype == memory.dtype and features.stride(2) == 1:
        return features
    return memory.new_empty(batch, stripes, channels)


def prepare(
    local_features: Tensor, memory: Tensor, features: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operand (B, n, C) in the memory's dtype, squares (n, parts, at least B), and the features' operand (B, C').

    features: (B, C'), what the classifier sees, or None.
    """
    batch, stripes, channels = local_features.shape
    operand = operand_of(local_features, memory)
    unchanged = features if features is None else features.unsqueeze(1)
    feature_operand = unchanged if unchanged is None else operand_of(unchanged, memory)
    converts = feature_operand is not unchanged
    chosen = PREPARE
    parts = cdiv(max(channels, features.shape[1] if converts else 0), chosen.blocks["BLOCK_C"])
    squares = local_features.new_empty(stripes, parts, score_row(batch), dtype=torch.float32)
    args = {
        "local_pointer": local_features,
        "operand_pointer": None if operand is local_features else operand,
        "squares_pointer": squares,
        "features_pointer": features if converts else None,
        "feature_operand_pointer": feature_operand if converts else None,
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
        "feature_channels": features.shape[1] if converts else 0,
        "feature_stride_b": features.stride(0) if converts else 0,
        "feature_stride_c": features.stride(1) if converts else 0,
        "feature_operand_stride_b": feature_operand.stride(0) if converts else 0,
        "feature_operand_stride_c": feature_operand.stride(2) if converts else 0,
    }
    programs = cdiv(batch, chosen.blocks["BLOCK_B"]) * (stripes + converts) * parts
    launch(prepare_kernel, (programs,), args, {"STRIPES": stripes, **chosen.blocks}, chosen.options)
    return operand, squares, feature_operand if feature_operand is None else feature_operand.squeeze(1)


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
    operand, squares, _ = prepare(local_features, memory)
    revised = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row = score_row(classes) if scores_are_kept(local_features, memory) else 0
    scores = logits.new_empty(stripes, batch, row, dtype=torch.float32)
    scale = logits.new_empty(stripes, batch, dtype=torch.float32)
    launch_revise(logits, operand, squares, memory, revised, scores if row else None, scale)
    return revised, scores, scale

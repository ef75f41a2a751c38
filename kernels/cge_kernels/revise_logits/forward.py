"""The forward kernels of revise_logits and their launches; op.py has the formulas.

cast_and_norm: a program owns BLOCK_B samples x BLOCK_C channels of one stripe. revise, the matmul with sigmoid, n-th
root and revision in its epilogue: a program owns BLOCK_N classes x BLOCK_B samples, of all stripes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cge_kernels.common.budget import empty_scores, score_row
from cge_kernels.common.device_functions import NORM_EPS, jit, log_sigmoid, multiply, product, sum_parts, tl
from cge_kernels.common.launch import Tiles, current_target, float32_precision
from cge_kernels.common.plan import Piece, Plan
from cge_kernels.common.tiles import CAST_AND_NORM, block_of_parts, cdiv, scores_tiles


@jit
def cast_and_norm_kernel(
    local_ptr, local_cast_ptr, partial_sq_norms_ptr, features_ptr, features_cast_ptr, batch, channels, parts,
    local_stride_0, local_stride_1, local_stride_2, local_cast_stride_0, local_cast_stride_1, local_cast_stride_2,
    partial_sq_norms_stride_1, feature_channels, features_stride_0, features_stride_1, features_cast_stride_0,
    features_cast_stride_1,
    STRIPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_B samples x BLOCK_C channels of one stripe, or of the features, which come last.

    local_ptr: (B, n, C), any strides
    local_cast_ptr: (B, n, C), any strides, the same in the matmul's dtype; None if local_ptr can be read itself
    partial_sq_norms_ptr: (n, parts, at least B) float32, a part for each BLOCK_C channels
    features_ptr: (B, C'), any strides, or None
    features_cast_ptr: (B, C'), any strides, the same in the matmul's dtype, or None
    """
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    if features_cast_ptr is not None:
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
        local_offsets = sample[:, None] * local_stride_0 + stripe * local_stride_1 + channel[None, :] * local_stride_2
        local = tl.load(local_ptr + local_offsets, mask=mask, other=0.0).to(tl.float32)
        sq_norms = tl.sum(product(local, local), axis=1)
        row = tl.cast(stripe * parts + part, tl.int64) * partial_sq_norms_stride_1
        tl.store(partial_sq_norms_ptr + row + sample, sq_norms, mask=sample_mask)
        if local_cast_ptr is not None:
            rows = local_cast_ptr + tl.cast(stripe, tl.int64) * local_cast_stride_1
            tl.store(
                rows + sample[:, None] * local_cast_stride_0 + channel[None, :] * local_cast_stride_2, local, mask=mask
            )
    elif features_cast_ptr is not None:
        mask = sample_mask[:, None] & (channel < feature_channels)[None, :]
        offsets = sample[:, None] * features_stride_0 + channel[None, :] * features_stride_1
        features = tl.load(features_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = sample[:, None] * features_cast_stride_0 + channel[None, :] * features_cast_stride_1
        tl.store(features_cast_ptr + offsets, features, mask=mask)


@jit
def revise_tile(
    logits_ptr, local_cast_ptr, partial_sq_norms_ptr, memory_ptr, revised_ptr, scores_ptr, inv_norm_ptr,
    batch_tile, class_tile, batch, classes, channels, parts, logits_stride_b, logits_stride_k, memory_stride,
    local_stride_b, local_stride_i, local_stride_c, partial_row, score_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores, weights and revised logits of BLOCK_N classes and BLOCK_B samples.

    logits_ptr: (B, N), any strides
    local_cast_ptr: (B, n, C), any strides, in the matmul's dtype
    partial_sq_norms_ptr: (n, parts, partial_row) float32
    memory_ptr: (n, N, C), in the matmul's dtype
    Results, each unless None:
    revised_ptr: (B, N) in the logits' dtype, contiguous
    scores_ptr: (n, B, score_row) float32, 0 beyond N
    inv_norm_ptr: (n, B) float32, 1 / max(||f_i||, 1e-12)

    Classes are the tile's rows: a few fill a tensor core's instruction, and without tensor cores the lanes of a warp,
    side by side along the samples, share a memory row by broadcast.
    """
    sample = (batch_tile * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    sample_mask = sample < batch
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    class_mask = identity < classes
    identity_wide = identity.to(tl.int64)[:, None]
    log_weight = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for stripe in range(STRIPES):
        memory_rows = memory_ptr + tl.cast(stripe, tl.int64) * memory_stride + identity_wide * channels
        local_columns = local_cast_ptr + tl.cast(stripe, tl.int64) * local_stride_i + sample[None, :] * local_stride_b
        accumulator = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        accumulator = multiply(
            memory_rows, local_columns, class_mask, sample_mask, 0, channels, channels, 1, local_stride_c, accumulator,
            memory_ptr.dtype.element_ty, PRECISION, BLOCK_K,
        )  # fmt: skip
        sq_norm = sum_parts(partial_sq_norms_ptr, partial_row, sample, sample_mask, stripe, parts, BLOCK_B, BLOCK_PARTS)
        inv_norm = 1.0 / tl.maximum(tl.sqrt_rn(sq_norm), NORM_EPS)
        if inv_norm_ptr is not None:  # noqa: SIM102 (known at compile time, so that no None is stored to)
            if class_tile == 0:
                tl.store(inv_norm_ptr + stripe * batch + sample, inv_norm, mask=sample_mask)
        score = accumulator * inv_norm[None, :]
        if scores_ptr is not None:
            score_rows = (tl.cast(stripe, tl.int64) * batch + sample)[None, :] * score_row
            inside = (identity < score_row)[:, None] & sample_mask[None, :]
            tl.store(scores_ptr + score_rows + identity[:, None], score, mask=inside)
        log_weight += log_sigmoid(score)
    if revised_ptr is not None:
        mask = class_mask[:, None] & sample_mask[None, :]
        weight = tl.exp(log_weight / STRIPES)
        logit_offsets = sample[None, :] * logits_stride_b + identity_wide * logits_stride_k
        logit = tl.load(logits_ptr + logit_offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(revised_ptr + sample[None, :] * classes + identity_wide, logit * weight, mask=mask)


@jit
def revise_kernel(
    logits_ptr, local_cast_ptr, partial_sq_norms_ptr, memory_ptr, revised_ptr, scores_ptr, inv_norm_ptr,
    batch, classes, channels, parts, logits_stride_0, logits_stride_1, memory_stride_0,
    local_cast_stride_0, local_cast_stride_1, local_cast_stride_2, partial_sq_norms_stride_1, scores_stride_1,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Forward: one program for each tile; tiles of the same classes are neighbours, so that L2 serves the memory.

    Pointers as in revise_tile.
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    revise_tile(
        logits_ptr, local_cast_ptr, partial_sq_norms_ptr, memory_ptr,
        revised_ptr, scores_ptr, inv_norm_ptr,
        tl.program_id(0) % batch_tiles, tl.program_id(0) // batch_tiles,
        batch, classes, channels, parts, logits_stride_0, logits_stride_1, memory_stride_0,
        local_cast_stride_0, local_cast_stride_1, local_cast_stride_2, partial_sq_norms_stride_1, scores_stride_1,
        STRIPES, PRECISION, BLOCK_PARTS, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip


class Casts(NamedTuple):
    """What the matmuls read, as cast_and_norm_kernel stores it."""

    local: Tensor  # (B, n, C) in the memory's dtype
    partial_sq_norms: Tensor  # (n, parts, at least B) float32
    features: Tensor | None  # (B, C') in the memory's dtype


def cast_layout(features: Tensor, memory: Tensor) -> Piece | None:
    """Where features (B, C) or (B, n, C) go in the memory's dtype; None if the matmul can read them themselves.

    Tensor cores take features with C contiguous. Without them each lane reads the features of its own samples, and
    only with B contiguous (a row padded to 16) do they lie in different banks of the shared memory.
    """
    if memory.dtype == torch.float32 and float32_precision(current_target(memory)) == "ieee":
        row, channels = score_row(features.shape[0]), features.shape[-1]
        strides = (1, channels * row, row) if features.dim() == 3 else (1, row)
        return Piece(tuple(features.shape), memory.dtype, strides)
    if features.dtype == memory.dtype and features.stride(-1) == 1:
        return None
    return Piece(tuple(features.shape), memory.dtype)


def cast_and_norm(plan: Plan, local_features: Tensor, memory: Tensor, features: Tensor | None = None) -> Casts:
    """Local features and, unless None, what the classifier sees (B, C'), cast; squared lengths of the former."""
    local_piece, features_piece = plan.once(
        lambda: (
            cast_layout(local_features, memory),
            None if features is None else cast_layout(features, memory),
        )
    )

    def sizes() -> tuple[int, int, int, int, int]:
        batch, stripes, channels = local_features.shape
        feature_channels = features.shape[1] if features_piece else 0
        return (
            batch,
            stripes,
            channels,
            feature_channels,
            cdiv(max(channels, feature_channels), CAST_AND_NORM["BLOCK_C"]),
        )

    def pieces() -> list[Piece]:
        batch, stripes, _, _, parts = sizes()
        sq_norms = Piece((stripes, parts, score_row(batch)), torch.float32)
        return [sq_norms, *[piece for piece in (local_piece, features_piece) if piece]]

    def prepare() -> tuple[int, Tiles, dict[str, int]]:
        batch, stripes, channels, feature_channels, parts = sizes()
        programs = cdiv(batch, CAST_AND_NORM["BLOCK_B"]) * (stripes + bool(features_piece)) * parts
        scalars: dict[str, Any] = {
            "batch": batch,
            "channels": channels,
            "parts": parts,
            "feature_channels": feature_channels,
        }
        return programs, CAST_AND_NORM, {**scalars, "STRIPES": stripes}

    partial_sq_norms, *converted = plan.scratch(local_features, pieces)
    local_cast = converted.pop(0) if local_piece else None
    features_cast = converted.pop(0) if features_piece else None
    plan.launch(
        cast_and_norm_kernel,
        {
            "local": local_features, "local_cast": local_cast, "partial_sq_norms": partial_sq_norms,
            "features": features if features_piece else None, "features_cast": features_cast,
        },
        prepare,
    )  # fmt: skip
    return Casts(
        local_features if local_cast is None else local_cast,
        partial_sq_norms,
        features if features_cast is None else features_cast,
    )


def launch_revise(
    plan: Plan, logits: Tensor | None, casts: Casts, memory: Tensor, revised: Tensor | None, scores: Tensor | None,
    inv_norm: Tensor | None,
) -> None:  # fmt: skip
    """Fills revised (B, N), scores (n, B, score_row) and inv_norm (n, B), each unless None."""

    def prepare() -> tuple[int, Tiles, dict[str, Any]]:
        batch, stripes, channels = casts.local.shape
        classes, parts, target = memory.shape[1], casts.partial_sq_norms.shape[1], current_target(memory)
        tiles = scores_tiles(target, memory.dtype, batch, classes)
        scalars: dict[str, Any] = {
            "batch": batch,
            "classes": classes,
            "channels": channels,
            "parts": parts,
            "STRIPES": stripes,
        }
        scalars |= {"PRECISION": float32_precision(target), "BLOCK_PARTS": block_of_parts(parts)}
        return cdiv(batch, tiles["BLOCK_B"]) * cdiv(classes, tiles["BLOCK_N"]), tiles, scalars

    plan.launch(
        revise_kernel,
        {
            "logits": logits, "local_cast": casts.local, "partial_sq_norms": casts.partial_sq_norms, "memory": memory,
            "revised": revised, "scores": scores, "inv_norm": inv_norm,
        },
        prepare,
    )  # fmt: skip


def launch_forward(
    plan: Plan, logits: Tensor, local_features: Tensor, memory: Tensor, local_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Revised logits (B, N), scores (n, B, score_row) or (n, B, 0) if they are not kept, inv_norm (n, B)."""
    casts = cast_and_norm(plan, local_features, memory)
    revised = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scores, inv_norm = empty_scores(len(local_features), memory, torch.float32)
    launch_revise(plan, logits, casts, memory, revised, scores if scores.shape[2] else None, inv_norm)
    return revised, scores, inv_norm

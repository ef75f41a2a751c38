"""Local classification by cosine to a class memory (NLC) and revision of the global logits (GLR).

Forward   s_i = <f_i, M_i> / max(||f_i||, 1e-12);  log w = mean_i log sigmoid(s_i);  revised = p * w.
Backward  dp = g * w;  ds_i = g * p * w * (1 - sigmoid(s_i)) / n;
          df_i = (ds_i M_i - u_i * <ds_i, s_i>) / ||f_i||, u_i = f_i / ||f_i||: since s_i = <u_i, M_i>, the projection
          <u_i, ds_i M_i> is a sum over classes of numbers that are at hand.
Kernels: prepare (squared lengths, and the local features in the memory's dtype), revise (matmul, and in its epilogue
sigmoid, n-th root and revision; a program owns BLOCK_B samples x BLOCK_N classes of all stripes), and backwards
grad_scores (elementwise) and grad_local (matmul; a program owns BLOCK_B samples x BLOCK_C channels of one stripe).
The length is not summed beside the dot: the operand would be needed in registers too and leave its swizzled layout.
Saved for the backward: the inputs, the squared lengths and, if CGE_SCRATCH_MB has room for them, the scores; else the
backward computes them again, chunk of classes by chunk, in that room.
"""

import torch
from torch import Tensor

from cge_kernels import aten
from cge_kernels.checks import accumulation_dtype, require_same_device, require_shape, require_tensor
from cge_kernels.configurations import (
    cdiv,
    chunk_of_classes,
    grad_local_configuration,
    grad_scores_configuration,
    next_power_of_2,
    prepare_configuration,
    revise_configuration,
    score_row,
    scores_are_kept,
)
from cge_kernels.dispatch import implementation
from cge_kernels.language import INTERPRETED, jit, tl, triton
from cge_kernels.launch import current_target, float32_precision, launch

NORM_EPS = tl.constexpr(1e-12) if triton else 1e-12  # lower bound of a local feature's length


@jit
def prepare_kernel(
    local_pointer, operand_pointer, squares_pointer, channels, stride_b, stride_i, stride_c,
    STRIPES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program for each sample and stripe: local (B, n, C), any strides -> operand (B, n, C) in its own dtype or
    None, squares (B, n, 1) float32."""
    row = tl.program_id(0).to(tl.int64)
    local_row = local_pointer + row // STRIPES * stride_b + row % STRIPES * stride_i
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = channel < channels
        feature = tl.load(local_row + channel.to(tl.int64) * stride_c, mask=mask, other=0.0)
        if operand_pointer is not None:
            operand = feature.to(operand_pointer.dtype.element_ty)
            tl.store(operand_pointer + row * channels + channel, operand, mask=mask)
        feature = feature.to(tl.float32)
        total += feature * feature
    tl.store(squares_pointer + row, tl.sum(total, axis=0))


@jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; the interpreter knows no bfloat16 product."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@jit
def inverse_length(
    squares_pointer, sample, sample_mask, stripe, parts, STRIPES: tl.constexpr, BLOCK_PARTS: tl.constexpr
):
    """(BLOCK_B,) 1 / max(||f_i||, 1e-12) from squares (B, n, parts)."""
    part = tl.arange(0, BLOCK_PARTS)
    offsets = (sample.to(tl.int64) * STRIPES + stripe)[:, None] * parts + part[None, :]
    squares = tl.load(squares_pointer + offsets, mask=sample_mask[:, None] & (part < parts)[None, :], other=0.0)
    return 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=1)), NORM_EPS)


@jit
def log_sigmoid(score):
    """For scores in [-1, 1], where exp neither overflows nor vanishes."""
    return -tl.log(1.0 + tl.exp(-score))


@jit
def revise_tile(
    logits_pointer, operand_pointer, squares_pointer, memory_pointer, revised_pointer, scores_pointer,
    batch_tile, class_tile, batch, classes, channels, parts, logits_stride_b, logits_stride_k, memory_stride_i,
    operand_stride_b, operand_stride_i, score_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores, weights and revised logits of BLOCK_B samples and BLOCK_N classes.

    logits (B, N), any strides; operand (B, n, C) and memory (n, N, C), the matmul's operands, C contiguous; squares
    (B, n, parts) float32. Results, each where its pointer is not None: revised (B, N) in the logits' dtype; scores
    (n, B, score_row) float32, 0 beyond N.
    """
    sample = batch_tile * BLOCK_B + tl.arange(0, BLOCK_B)
    sample_mask = sample < batch
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    class_mask = identity < classes
    block = tl.arange(0, BLOCK_K)
    log_weight = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for stripe in range(STRIPES):
        feature_rows = operand_pointer + sample.to(tl.int64)[:, None] * operand_stride_b + stripe * operand_stride_i
        memory_rows = (
            memory_pointer + stripe.to(tl.int64) * memory_stride_i + identity.to(tl.int64)[:, None] * channels
        )
        product = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for start in range(0, channels, BLOCK_K):
            channel = start + block
            channel_mask = (channel < channels)[None, :]
            features = tl.load(feature_rows + channel[None, :], mask=sample_mask[:, None] & channel_mask, other=0.0)
            rows = tl.load(memory_rows + channel[None, :], mask=class_mask[:, None] & channel_mask, other=0.0)
            product = dot(features, rows.T, product, PRECISION)
        scale = inverse_length(squares_pointer, sample, sample_mask, stripe, parts, STRIPES, BLOCK_PARTS)
        score = product * scale[:, None]
        if scores_pointer is not None:
            score_rows = (stripe.to(tl.int64) * batch + sample)[:, None] * score_row
            inside = sample_mask[:, None] & (identity < score_row)[None, :]
            tl.store(scores_pointer + score_rows + identity[None, :], score, mask=inside)
        log_weight += log_sigmoid(score)
    if revised_pointer is not None:
        mask = sample_mask[:, None] & class_mask[None, :]
        weight = tl.exp(log_weight / STRIPES)
        logit_offsets = sample.to(tl.int64)[:, None] * logits_stride_b + identity.to(tl.int64)[None, :] * logits_stride_k
        logit = tl.load(logits_pointer + logit_offsets, mask=mask, other=0.0).to(tl.float32)
        revised = (logit * weight).to(revised_pointer.dtype.element_ty)
        tl.store(revised_pointer + sample.to(tl.int64)[:, None] * classes + identity[None, :], revised, mask=mask)


@jit
def revise_kernel(
    logits_pointer, operand_pointer, squares_pointer, memory_pointer, revised_pointer, scores_pointer,
    batch, classes, channels, parts, logits_stride_b, logits_stride_k, memory_stride_i,
    operand_stride_b, operand_stride_i, score_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Forward: one program for each tile; tiles of the same classes are neighbours, so that L2 serves the memory."""
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    revise_tile(
        logits_pointer, operand_pointer, squares_pointer, memory_pointer, revised_pointer, scores_pointer,
        tl.program_id(0) % batch_tiles, tl.program_id(0) // batch_tiles,
        batch, classes, channels, parts, logits_stride_b, logits_stride_k, memory_stride_i,
        operand_stride_b, operand_stride_i, score_row,
        STRIPES, PRECISION, BLOCK_PARTS, BLOCK_B, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@jit
def grad_scores_kernel(
    grad_pointer, logits_pointer, scores_pointer, grad_logits_pointer, grad_scores_pointer, projection_pointer,
    batch, classes, grad_stride_b, grad_stride_k, logits_stride_b, logits_stride_k, grad_logits_stride_b, score_row,
    first_tile, projection_row,
    STRIPES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Backward, elementwise: one program for BLOCK_B samples x BLOCK_N classes.

    grad, logits (B, N), any strides; scores (n, B, score_row) float32 -> grad_logits (B, N), classes contiguous; and
    unless None, grad_scores (n, B, score_row) in the matmul's dtype, 0 beyond N, and projection (B, n, projection_row)
    float32, whose column first_tile + tile takes this tile's share of <ds_i, s_i>.
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
    stored = grad_logit.to(grad_logits_pointer.dtype.element_ty)
    tl.store(grad_logits_pointer + sample[:, None] * grad_logits_stride_b + wide, stored, mask=mask)
    if grad_scores_pointer is not None:
        logit = tl.load(logits_pointer + sample[:, None] * logits_stride_b + wide * logits_stride_k, mask=mask, other=0.0)
        grad_log_weight = grad_logit * logit.to(tl.float32) / STRIPES
        for stripe in range(STRIPES):
            score = tl.load(scores_pointer + stripe * stripe_stride + score_offsets, mask=inside, other=0.0)
            grad_score = grad_log_weight / (1.0 + tl.exp(score))
            stored = grad_score.to(grad_scores_pointer.dtype.element_ty)
            tl.store(grad_scores_pointer + stripe * stripe_stride + score_offsets, stored, mask=inside)
            share = tl.sum(grad_score * score, axis=1)
            projection_offsets = (sample * STRIPES + stripe) * projection_row + first_tile + class_tile
            tl.store(projection_pointer + projection_offsets, share, mask=sample_mask)


@jit
def grad_local_kernel(
    grad_scores_pointer, memory_pointer, earlier_pointer, local_pointer, squares_pointer, projection_pointer,
    grad_local_pointer, batch, classes, channels, parts, memory_stride_i,
    local_stride_b, local_stride_i, local_stride_c, score_row, projection_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_PROJECTION: tl.constexpr,
):  # fmt: skip
    """Backward, matmul over classes: one program for BLOCK_B samples x BLOCK_C channels of one stripe.

    grad_scores (n, B, score_row) and memory (n, N, C), the operands; earlier (B, n, C) float32, the sum over the chunks
    of classes before this one, or None; grad_local (B, n, C). After the last chunk, whose local (B, n, C) is not None,
    the sum goes through the normalisation: squares (B, n, parts), projection (B, n, projection_row).
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    stripe = tl.program_id(0) // batch_tiles % STRIPES
    channel = tl.program_id(0) // batch_tiles // STRIPES * BLOCK_C + tl.arange(0, BLOCK_C)
    sample_mask = sample < batch
    channel_mask = channel < channels
    mask = sample_mask[:, None] & channel_mask[None, :]
    block = tl.arange(0, BLOCK_K)
    gradient_rows = grad_scores_pointer + (stripe.to(tl.int64) * batch + sample)[:, None] * score_row
    memory_columns = memory_pointer + stripe.to(tl.int64) * memory_stride_i + channel[None, :]
    product = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
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
        product = dot(gradients, rows, product, PRECISION)
    result_offsets = (sample * STRIPES + stripe)[:, None] * channels + channel[None, :]
    if earlier_pointer is not None:
        product += tl.load(earlier_pointer + result_offsets, mask=mask, other=0.0)
    if local_pointer is not None:
        projection = tl.zeros([BLOCK_B], tl.float32)
        for start in range(0, projection_row, BLOCK_PROJECTION):
            part = start + tl.arange(0, BLOCK_PROJECTION)
            offsets = (sample * STRIPES + stripe)[:, None] * projection_row + part[None, :]
            inside = sample_mask[:, None] & (part < projection_row)[None, :]
            projection += tl.sum(tl.load(projection_pointer + offsets, mask=inside, other=0.0), axis=1)
        scale = inverse_length(squares_pointer, sample, sample_mask, stripe, parts, STRIPES, BLOCK_PARTS)
        # Below the bound the length is a constant: nothing to project out.
        projection = tl.where(scale * NORM_EPS < 0.999999, projection * scale, 0.0)
        wide = channel.to(tl.int64)[None, :]
        local_offsets = sample[:, None] * local_stride_b + stripe * local_stride_i + wide * local_stride_c
        local = tl.load(local_pointer + local_offsets, mask=mask, other=0.0).to(tl.float32)
        product = (product - local * projection[:, None]) * scale[:, None]
    tl.store(grad_local_pointer + result_offsets, product.to(grad_local_pointer.dtype.element_ty), mask=mask)


def prepare(local_features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The matmul's operand (B, n, C) in the memory's dtype, C contiguous, and squares (B, n, 1)."""
    batch, stripes, channels = local_features.shape
    is_operand = local_features.dtype == memory.dtype and local_features.stride(2) == 1
    operand = None if is_operand else local_features.new_empty(batch, stripes, channels, dtype=memory.dtype)
    squares = local_features.new_empty(batch, stripes, 1, dtype=torch.float32)
    args = {
        "local_pointer": local_features,
        "operand_pointer": operand,
        "squares_pointer": squares,
        "channels": channels,
        "stride_b": local_features.stride(0),
        "stride_i": local_features.stride(1),
        "stride_c": local_features.stride(2),
    }
    chosen = prepare_configuration(channels)
    launch(prepare_kernel, (batch * stripes,), args, {"STRIPES": stripes, **chosen.blocks}, chosen.options)
    return local_features if is_operand else operand, squares


def launch_revise(
    logits: Tensor | None, operand: Tensor, squares: Tensor, memory: Tensor, revised: Tensor | None, scores: Tensor | None
) -> None:
    """Fills revised (B, N) and scores (n, B, score_row), each unless None."""
    batch, stripes, channels = operand.shape
    classes, parts = memory.shape[1], squares.shape[2]
    target = current_target(operand)
    chosen = revise_configuration(target, memory.dtype, batch, classes)
    args = {
        "logits_pointer": logits,
        "operand_pointer": operand,
        "squares_pointer": squares,
        "memory_pointer": memory,
        "revised_pointer": revised,
        "scores_pointer": scores,
        "batch": batch,
        "classes": classes,
        "channels": channels,
        "parts": parts,
        "logits_stride_b": 0 if logits is None else logits.stride(0),
        "logits_stride_k": 0 if logits is None else logits.stride(1),
        "memory_stride_i": memory.stride(0),
        "operand_stride_b": operand.stride(0),
        "operand_stride_i": operand.stride(1),
        "score_row": 0 if scores is None else scores.shape[2],
    }
    constants = {
        "STRIPES": stripes,
        "PRECISION": float32_precision(target),
        "BLOCK_PARTS": next_power_of_2(parts),
        **chosen.blocks,
    }
    tiles = cdiv(batch, chosen.blocks["BLOCK_B"]) * cdiv(classes, chosen.blocks["BLOCK_N"])
    launch(revise_kernel, (tiles,), args, constants, chosen.options)


def launch_forward(logits: Tensor, local_features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Revised logits (B, N), scores (n, B, score_row) or (n, B, 0) if they are not kept, squares (B, n, parts)."""
    stripes, classes, _ = memory.shape
    batch = local_features.shape[0]
    operand, squares = prepare(local_features, memory)
    revised = torch.empty_like(logits, memory_format=torch.contiguous_format)
    row = score_row(classes) if scores_are_kept(local_features, memory) else 0
    scores = logits.new_empty(stripes, batch, row, dtype=torch.float32)
    launch_revise(logits, operand, squares, memory, revised, scores if row else None)
    return revised, scores, squares


def launch_grad_scores(
    grad: Tensor, logits: Tensor, scores: Tensor, grad_logits: Tensor, grad_scores: Tensor | None,
    projection: Tensor | None, first_tile: int,
) -> None:  # fmt: skip
    """Fills grad_logits (B, N), grad_scores (n, B, score_row) and columns of projection (B, n, tiles)."""
    batch, classes = logits.shape
    chosen = grad_scores_configuration()
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
        "projection_row": 0 if projection is None else projection.shape[2],
    }
    tiles = cdiv(batch, chosen.blocks["BLOCK_B"]) * cdiv(scores.shape[2], chosen.blocks["BLOCK_N"])
    launch(grad_scores_kernel, (tiles,), args, {"STRIPES": scores.shape[0], **chosen.blocks}, chosen.options)


def launch_grad_local(
    grad_scores: Tensor, memory: Tensor, earlier: Tensor | None, local_features: Tensor | None, squares: Tensor,
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
        "squares_pointer": squares,
        "projection_pointer": projection,
        "grad_local_pointer": grad_local,
        "batch": batch,
        "classes": memory.shape[1],
        "channels": channels,
        "parts": squares.shape[2],
        "memory_stride_i": memory.stride(0),
        "local_stride_b": 0 if local_features is None else local_features.stride(0),
        "local_stride_i": 0 if local_features is None else local_features.stride(1),
        "local_stride_c": 0 if local_features is None else local_features.stride(2),
        "score_row": grad_scores.shape[2],
        "projection_row": projection.shape[2],
    }
    constants = {
        "STRIPES": stripes,
        "PRECISION": float32_precision(target),
        "BLOCK_PARTS": next_power_of_2(squares.shape[2]),
        "BLOCK_PROJECTION": min(64, next_power_of_2(projection.shape[2])),
        **chosen.blocks,
    }
    tiles = cdiv(batch, chosen.blocks["BLOCK_B"]) * stripes * cdiv(channels, chosen.blocks["BLOCK_C"])
    launch(grad_local_kernel, (tiles,), args, constants, chosen.options)


def launch_backward(
    grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, squares: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the logits (B, N) and of the local features (B, n, C), the latter empty without local_gradient."""
    stripes, classes, channels = memory.shape
    batch = logits.shape[0]
    kept = scores.shape[2] > 0
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not kept:
        operand, _ = prepare(local_features, memory)
    chunk = score_row(classes) if kept else chunk_of_classes(batch, stripes, classes)
    tile = grad_scores_configuration().blocks["BLOCK_N"]
    starts = range(0, classes, chunk)
    grad_local = local_features.new_empty((batch, stripes, channels) if local_gradient else 0)
    sums, projection = None, None
    if local_gradient:
        sums = grad_local if len(starts) == 1 else grad_local.new_empty(grad_local.shape, dtype=torch.float32)
        tiles = sum(cdiv(min(chunk, score_row(classes) - start), tile) for start in starts)
        projection = logits.new_empty(batch, stripes, tiles, dtype=torch.float32)
    first_tile = 0
    for start in starts:
        part = slice(start, start + chunk)
        rows = memory[:, part]
        row = score_row(rows.shape[1])
        if not kept:
            scores = logits.new_empty(stripes, batch, row, dtype=torch.float32)
            launch_revise(None, operand, squares, rows, None, scores)
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
                squares,
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
        logits.new_empty(batch, stripes, 1, dtype=dtype),
    )


@torch.library.custom_op("cge_kernels::revise_logits_backward", mutates_args=())
def revise_logits_backward_op(
    grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, squares: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return implementation(launch_backward, aten.revise_logits_backward, logits, local_features, memory)(
        grad, logits, local_features, memory, scores, squares, local_gradient
    )


@revise_logits_backward_op.register_fake
def _(grad, logits, local_features, memory, scores, squares, local_gradient):
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        local_features.new_empty(local_features.shape if local_gradient else 0),
    )


def setup_context(ctx, inputs, output) -> None:
    logits, local_features, memory, ctx.local_gradient = inputs
    _, scores, squares = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, local_features, memory, scores, squares)


def backward(ctx, grad, _grad_scores, _grad_squares):
    if grad is None:
        return None, None, None, None
    local_gradient = ctx.local_gradient and ctx.needs_input_grad[1]
    grad_logits, grad_local = revise_logits_backward_op(grad, *ctx.saved_tensors, local_gradient)
    return grad_logits, grad_local if local_gradient else None, None, None


revise_logits_op.register_autograd(backward, setup_context=setup_context)


def check_memory(name: str, memory: Tensor) -> None:
    """Raises unless `memory` is a contiguous floating tensor (n, N, C)."""
    require_tensor(name, memory, "(n, N, C)")
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

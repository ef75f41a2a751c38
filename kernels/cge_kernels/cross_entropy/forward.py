"""The forward kernels of revised_cross_entropy; revised_cross_entropy.py has the formulas.

cross_entropy: matmuls of classifier and memory, and in their epilogue weights, revision and the softmax's statistics;
a program owns BLOCK_N classes x BLOCK_B samples. combine: a program goes over the tiles' statistics of BLOCK_B samples
for one classifier, the global one or that of a stripe.
Logits and scores have classes as rows, so that a chunk of classes is contiguous, and a warp's lanes lie along samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cge_kernels.common.device_functions import jit, product, tl
from cge_kernels.common.launch import current_target, float32_precision, launch
from cge_kernels.common.tiles import (
    COMBINE,
    cdiv,
    chunk_of_statistics,
    cross_entropy_configuration,
    logits_are_kept,
    next_power_of_2,
    score_row,
)
from cge_kernels.revise_logits.forward import MAX_PARTS, NORM_EPS, log_sigmoid, multiply, prepare, sum_parts

FAR = 2**31 - 1  # a class beyond all others


@jit
def store_best(
    highest_pointer, winner_pointer, row, values, identity, class_mask, sample, sample_mask, FAR: tl.constexpr,
):  # fmt: skip
    """Stores each sample's highest value (classes, samples) and the lowest class that has it, in a row of results."""
    masked = tl.where(class_mask[:, None], values, -float("inf"))
    highest = tl.max(masked, axis=0)
    winner = tl.min(tl.where(masked == highest[None, :], identity[:, None], FAR), axis=0)
    tl.store(highest_pointer + row + sample, highest, mask=sample_mask)
    tl.store(winner_pointer + row + sample, winner, mask=sample_mask)
    return highest


@jit
def cross_entropy_kernel(
    feature_operand_pointer, weight_pointer, bias_pointer, operand_pointer, squares_pointer, memory_pointer,
    labels_pointer, kept_pointer, scale_pointer, highest_pointer, winner_pointer, sums_pointer, target_pointer,
    batch, classes, channels, feature_channels, parts, first_class, weight_stride_k,
    memory_stride_i, features_stride_b, features_stride_c, operand_stride_b, operand_stride_i, operand_stride_c,
    squares_row, kept_rows, kept_row, partial_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N classes x BLOCK_B samples; tiles of the same classes are neighbours, so that L2 serves
    classifier and memory.

    feature_operand (B, C) and operand (B, n, C'), any strides, and memory (n, N, C'), in one dtype; weight (N, C), C
    contiguous, any dtype; bias (N,) or None; squares (n, parts, squares_row) float32; labels (B,), any integer.
    Results. kept (n+1, kept_rows, kept_row) float32, unless None: logits, then each stripe's scores, of no
    meaning beyond B. Unless highest is
    None: scale (n, B) float32, 1 / max(||f_i||, 1e-12); target (B,) float32, the label's revised logit, where the label
    is first_class and one of the N that follow; and for each tile of classes highest and winner (tiles, n+1,
    partial_row), of the revised logits and of each stripe's scores, winner counted from first_class, int32; sums
    (tiles, 2, partial_row) float32: sum of exp(revised - highest), sum of the revised logits.
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    class_tile = tl.program_id(0) // batch_tiles
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    sample_mask = sample < batch
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    class_mask = identity < classes
    identity_wide = identity.to(tl.int64)[:, None]
    mask = class_mask[:, None] & sample_mask[None, :]
    kept_mask = class_mask[:, None] & (sample < kept_row)[None, :]
    kept_offsets = identity_wide * kept_row + sample[None, :]
    kept_stride = tl.cast(kept_rows, tl.int64) * kept_row
    partial = tl.cast(class_tile, tl.int64) * (STRIPES + 1) * partial_row
    log_weight = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for stripe in range(STRIPES):
        score = multiply(
            memory_pointer + tl.cast(stripe, tl.int64) * memory_stride_i + identity_wide * channels,
            operand_pointer + tl.cast(stripe, tl.int64) * operand_stride_i + sample[None, :] * operand_stride_b,
            class_mask, sample_mask, channels, operand_stride_c, tl.zeros([BLOCK_N, BLOCK_B], tl.float32),
            PRECISION, BLOCK_K,
        )  # fmt: skip
        squares = sum_parts(squares_pointer, squares_row, sample, sample_mask, stripe, parts, BLOCK_B, BLOCK_PARTS)
        scale = 1.0 / tl.maximum(tl.sqrt_rn(squares), NORM_EPS)
        score *= scale[None, :]
        if kept_pointer is not None:
            tl.store(kept_pointer + (stripe + 1) * kept_stride + kept_offsets, score, mask=kept_mask)
        if highest_pointer is not None:
            tl.store(scale_pointer + stripe * batch + sample, scale, mask=sample_mask & (class_tile == 0))
            row = partial + (stripe + 1) * partial_row
            store_best(highest_pointer, winner_pointer, row, score, identity, class_mask, sample, sample_mask, FAR)
        log_weight += log_sigmoid(score)
    logit = multiply(
        weight_pointer + identity_wide * weight_stride_k, feature_operand_pointer + sample[None, :] * features_stride_b,
        class_mask, sample_mask, feature_channels, features_stride_c,
        tl.zeros([BLOCK_N, BLOCK_B], tl.float32), PRECISION, BLOCK_W,
    )  # fmt: skip
    if bias_pointer is not None:
        logit += tl.load(bias_pointer + identity, mask=class_mask, other=0.0).to(tl.float32)[:, None]
    if kept_pointer is not None:
        tl.store(kept_pointer + kept_offsets, logit, mask=kept_mask)
    if highest_pointer is not None:
        revised = product(logit, tl.exp(log_weight / STRIPES))
        highest = store_best(
            highest_pointer, winner_pointer, partial, revised, identity, class_mask, sample, sample_mask, FAR
        )
        exponential = tl.where(class_mask[:, None], tl.exp(revised - highest[None, :]), 0.0)
        row = tl.cast(class_tile, tl.int64) * 2 * partial_row
        tl.store(sums_pointer + row + sample, tl.sum(exponential, axis=0), mask=sample_mask)
        total = tl.sum(tl.where(class_mask[:, None], revised, 0.0), axis=0)
        tl.store(sums_pointer + row + partial_row + sample, total, mask=sample_mask)
        label = tl.load(labels_pointer + sample, mask=sample_mask, other=0).to(tl.int64) - first_class
        is_label = mask & (identity_wide == label[None, :])
        target = tl.broadcast_to(target_pointer + sample[None, :], [BLOCK_N, BLOCK_B])
        tl.store(target, revised, mask=is_label)


@jit
def combine_kernel(
    highest_pointer, winner_pointer, sums_pointer, target_pointer, labels_pointer,
    all_highest_pointer, all_winner_pointer, all_sums_pointer, all_target_pointer,
    loss_pointer, log_sum_pointer, correct_pointer, stripe_correct_pointer,
    batch, classes, tiles, first_class, all_classes, partial_row, label_smoothing,
    STRIPES: tl.constexpr, EARLIER: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_B samples of one classifier: 0 is the global one, i + 1 that of stripe i.

    Reads what cross_entropy_kernel stored for the tiles of `classes` classes from first_class on and, if EARLIER, what
    this kernel stored for those before them.
    With loss not None: loss and log_sum, the logarithm of the sum of exponentials (B,) float32; correct (B,) and
    stripe_correct (B, n) bool; a label that is none of all_classes gives a NaN loss. Else all_highest (n+1, B) float32; all_winner
    (n+1, B) int64, counted from class 0; all_sums (2, B); all_target (B,), 0 where the label is none of the classes
    gone over.
    """
    classifier = tl.program_id(0) % (STRIPES + 1)
    sample = (tl.program_id(0) // (STRIPES + 1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    sample_mask = sample < batch
    label = tl.load(labels_pointer + sample, mask=sample_mask, other=0).to(tl.int64)
    is_here = sample_mask & (label >= first_class) & (label < first_class + classes)
    target = tl.load(target_pointer + sample, mask=is_here, other=0.0)
    highest = tl.full([BLOCK_B], -float("inf"), tl.float32)
    winner = tl.full([BLOCK_B], FAR, tl.int64)
    exponentials = tl.zeros([BLOCK_B], tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    if EARLIER:
        highest = tl.load(all_highest_pointer + classifier * batch + sample, mask=sample_mask, other=0.0)
        winner = tl.load(all_winner_pointer + classifier * batch + sample, mask=sample_mask, other=0)
        # the global classifier's program stores these, meanwhile: no other may read them
        is_mine = sample_mask & (classifier == 0)
        exponentials = tl.load(all_sums_pointer + sample, mask=is_mine, other=0.0)
        total = tl.load(all_sums_pointer + batch + sample, mask=is_mine, other=0.0)
        target = tl.load(all_target_pointer + sample, mask=is_mine & (is_here == 0), other=0.0) + target
    for start in range(0, tiles, BLOCK_T):
        tile = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (tile < tiles) & sample_mask[None, :]
        offsets = (tile * (STRIPES + 1) + classifier) * partial_row + sample[None, :]
        tile_highest = tl.load(highest_pointer + offsets, mask=mask, other=-float("inf"))
        tile_highest = tl.where(sample_mask[None, :], tile_highest, 0.0)  # so that nothing beyond the batch is NaN
        tile_winner = tl.load(winner_pointer + offsets, mask=mask, other=FAR)
        most = tl.max(tile_highest, axis=0)
        best = tl.min(tl.where(tile_highest == most[None, :], tile_winner, FAR), axis=0)
        # the earlier one where they are equal: it is the lower
        winner = tl.where(most > highest, best.to(tl.int64) + first_class, winner)
        new_highest = tl.maximum(most, highest)
        if classifier == 0:
            offsets = tile * 2 * partial_row + sample[None, :]
            parts = tl.load(sums_pointer + offsets, mask=mask, other=0.0)
            scaled = product(parts, tl.exp(tile_highest - new_highest[None, :]))
            exponentials = exponentials * tl.exp(highest - new_highest) + tl.sum(scaled, axis=0)
            total += tl.sum(tl.load(sums_pointer + partial_row + offsets, mask=mask, other=0.0), axis=0)
        highest = new_highest
    if loss_pointer is not None:
        is_valid = (label >= 0) & (label < all_classes)
        correct = is_valid & (winner == label)
        if classifier == 0:
            log_sum = highest + tl.log(tl.where(sample_mask, exponentials, 1.0))
            loss = log_sum - (1.0 - label_smoothing) * target - label_smoothing * (total / all_classes)
            tl.store(loss_pointer + sample, tl.where(is_valid, loss, float("nan")), mask=sample_mask)
            tl.store(log_sum_pointer + sample, log_sum, mask=sample_mask)
            tl.store(correct_pointer + sample, correct, mask=sample_mask)
        else:
            tl.store(stripe_correct_pointer + sample * STRIPES + (classifier - 1), correct, mask=sample_mask)
    else:
        row = classifier * batch + sample
        tl.store(all_highest_pointer + row, highest, mask=sample_mask)
        tl.store(all_winner_pointer + row, winner, mask=sample_mask)
        if classifier == 0:
            tl.store(all_sums_pointer + sample, exponentials, mask=sample_mask)
            tl.store(all_sums_pointer + batch + sample, total, mask=sample_mask)
            tl.store(all_target_pointer + sample, target, mask=sample_mask)


class Partials(NamedTuple):
    """Each tile's statistics, as cross_entropy_kernel stores them."""

    highest: Tensor  # (tiles, n+1, at least B) float32
    winner: Tensor  # the same, int32
    sums: Tensor  # (tiles, 2, at least B) float32
    target: Tensor  # (B,) float32, only where the label is here


def launch_cross_entropy(
    feature_operand: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, squares: Tensor, memory: Tensor,
    labels: Tensor, first_class: int, kept: Tensor | None, scale: Tensor | None,
) -> Partials | None:  # fmt: skip
    """Fills kept (n+1, N, at least B) unless None; with scale (n, B), fills that too and returns the statistics."""
    batch, stripes, channels = operand.shape
    classes, parts = memory.shape[1], squares.shape[1]
    target = current_target(operand)
    chosen = cross_entropy_configuration(target, memory.dtype, batch, classes)
    tiles, row = cdiv(classes, chosen.blocks["BLOCK_N"]), score_row(batch)
    partials = None
    if scale is not None:
        highest = operand.new_empty(tiles, stripes + 1, row, dtype=torch.float32)
        sums = operand.new_empty(tiles, 2, row, dtype=torch.float32)
        target_logit = operand.new_empty(batch, dtype=torch.float32)
        partials = Partials(highest, torch.empty_like(highest, dtype=torch.int32), sums, target_logit)
    args = {
        "feature_operand_pointer": feature_operand,
        "weight_pointer": weight,
        "bias_pointer": bias,
        "operand_pointer": operand,
        "squares_pointer": squares,
        "memory_pointer": memory,
        "labels_pointer": labels,
        "kept_pointer": kept,
        "scale_pointer": scale,
        "highest_pointer": partials and partials.highest,
        "winner_pointer": partials and partials.winner,
        "sums_pointer": partials and partials.sums,
        "target_pointer": partials and partials.target,
        "batch": batch,
        "classes": classes,
        "channels": channels,
        "feature_channels": weight.shape[1],
        "parts": parts,
        "first_class": first_class,
        "weight_stride_k": weight.stride(0),
        "memory_stride_i": memory.stride(0),
        "features_stride_b": feature_operand.stride(0),
        "features_stride_c": feature_operand.stride(1),
        "operand_stride_b": operand.stride(0),
        "operand_stride_i": operand.stride(1),
        "operand_stride_c": operand.stride(2),
        "squares_row": squares.shape[2],
        "kept_rows": 0 if kept is None else kept.shape[1],
        "kept_row": 0 if kept is None else kept.shape[2],
        "partial_row": row,
    }
    constants = {
        "STRIPES": stripes,
        "PRECISION": float32_precision(target),
        "BLOCK_PARTS": min(MAX_PARTS, next_power_of_2(parts)),
        **chosen.blocks,
        # Float32 tiles of the shape of 16-bit ones would be loaded like these, eight numbers for each lane, and then
        # each request uses half of its sectors.
        "BLOCK_W": chosen.blocks["BLOCK_K"] // (2 if weight.itemsize > memory.itemsize else 1),
        "FAR": FAR,
    }
    grid = (cdiv(batch, chosen.blocks["BLOCK_B"]) * tiles,)
    launch(cross_entropy_kernel, grid, args, constants, chosen.options)
    return partials


def launch_combine(
    partials: Partials, labels: Tensor, first_class: int, classes: int, all_classes: int, earlier: bool,
    results: dict[str, Tensor | float],
) -> None:  # fmt: skip
    """Fills the results that are given, by the names of combine_kernel's arguments."""
    tiles, classifiers, row = partials.highest.shape
    names = (
        *("all_highest_pointer", "all_winner_pointer", "all_sums_pointer", "all_target_pointer"),
        *("loss_pointer", "log_sum_pointer", "correct_pointer", "stripe_correct_pointer"),
    )
    args = {
        **{f"{name}_pointer": tensor for name, tensor in partials._asdict().items()},
        "labels_pointer": labels,
        **dict.fromkeys(names),
        "batch": len(labels),
        "classes": classes,
        "tiles": tiles,
        "first_class": first_class,
        "all_classes": all_classes,
        "partial_row": row,
        "label_smoothing": 0.0,
        **results,
    }
    constants = {"STRIPES": classifiers - 1, "EARLIER": earlier, **COMBINE.blocks, "FAR": FAR}
    grid = (cdiv(len(labels), COMBINE.blocks["BLOCK_B"]) * classifiers,)
    launch(combine_kernel, grid, args, constants, COMBINE.options)


def launch_chunks(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    first_class: int, statistics: dict[str, Tensor], results: dict[str, Tensor | float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Goes over the classes, all at once if their logits are kept, and fills the results, with names as for
    launch_combine; `statistics` takes what is known before the last chunk.

    Returns kept (n+1, N, at least B), or (n+1, 0, ...) if it is not kept, and scale (n, B).
    """
    stripes, classes, _ = memory.shape
    batch = len(features)
    labels, weight = labels.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    operand, squares, feature_operand = prepare(local_features, memory, features)
    rows = classes if logits_are_kept(batch, stripes, classes) else 0
    kept = features.new_empty(stripes + 1, rows, score_row(batch), dtype=torch.float32)
    scale = features.new_empty(stripes, batch, dtype=torch.float32)
    chunk = classes if rows else chunk_of_statistics(batch, stripes, classes)
    for start in range(0, classes, chunk):
        part = slice(start, min(start + chunk, classes))
        first, is_last = first_class + start, part.stop == classes
        partials = launch_cross_entropy(
            feature_operand,
            weight[part],
            None if bias is None else bias[part],
            operand,
            squares,
            memory[:, part],
            labels,
            first,
            kept if rows else None,
            scale,
        )
        known = results if is_last and chunk >= classes else statistics | (results if is_last else {})
        launch_combine(partials, labels, first, part.stop - start, classes, start > 0, known)
    return kept, scale


def empty_statistics(features: Tensor, stripes: int) -> dict[str, Tensor]:
    """Where combine_kernel stores statistics."""
    highest = features.new_empty(stripes + 1, len(features), dtype=torch.float32)
    return {
        "all_highest_pointer": highest,
        "all_winner_pointer": torch.empty_like(highest, dtype=torch.int64),
        "all_sums_pointer": torch.empty_like(highest[:2]),
        "all_target_pointer": torch.empty_like(highest[0]),
    }


def launch_forward(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss and log_sum (B,), correct (B,) and stripe_correct (B, n) bool, kept and scale as launch_chunks has them."""
    loss = features.new_empty(len(features), dtype=torch.float32)
    log_sum, correct = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)
    stripe_correct = correct.new_empty(local_features.shape[:2])
    results = {
        "loss_pointer": loss,
        "log_sum_pointer": log_sum,
        "correct_pointer": correct,
        "stripe_correct_pointer": stripe_correct,
        "label_smoothing": label_smoothing,
    }
    statistics = empty_statistics(features, len(memory))
    kept, scale = launch_chunks(features, weight, local_features, memory, labels, bias, 0, statistics, results)
    return loss, log_sum, correct, stripe_correct, kept, scale


def launch_statistics(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    first_class: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """highest and winner (n+1, B), sums (2, B), target (B,), kept and scale as launch_chunks has them."""
    statistics = empty_statistics(features, len(memory))
    kept, scale = launch_chunks(
        features, weight, local_features, memory, labels, bias, first_class, statistics, statistics
    )
    return *statistics.values(), kept, scale

"""The forward kernels of revised_cross_entropy and their launches; op.py has the formulas.

cross_entropy: matmuls of classifier and memory, and in their epilogue weights, revision and the softmax's statistics;
a program owns BLOCK_N classes x BLOCK_B samples. reduce_tiles: a program goes over the tiles' statistics of BLOCK_B
samples for one classifier, the global one or that of a stripe.
Logits and scores have classes as rows, so that a chunk of classes is contiguous, and a warp's lanes lie along samples.
"""

from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.budget import chunk_of_statistics, empty_saved, kept_parts, score_row
from cge_kernels.common.device_functions import NORM_EPS, jit, log_sigmoid, multiply, product, sum_parts, tl
from cge_kernels.common.launch import Tiles, current_target, float32_precision
from cge_kernels.common.plan import Piece, Plan
from cge_kernels.common.tiles import REDUCE_TILES, block_of_parts, cdiv, scores_tiles
from cge_kernels.cross_entropy import split
from cge_kernels.cross_entropy.inputs import Inputs, Loss, Statistics, as_dict, empty_loss, empty_statistics
from cge_kernels.cross_entropy.split import FAR
from cge_kernels.revise_logits.forward import Casts, cast_and_norm


@jit
def store_best(
    row_max_ptr, argmax_ptr, row, values, identity, class_mask, sample, sample_mask, FAR: tl.constexpr,
):  # fmt: skip
    """Stores each sample's highest value (classes, samples) and the lowest class that has it, in a row of results."""
    masked = tl.where(class_mask[:, None], values, -float("inf"))
    row_max = tl.max(masked, axis=0)
    argmax = tl.min(tl.where(masked == row_max[None, :], identity[:, None], FAR), axis=0)
    tl.store(row_max_ptr + row + sample, row_max, mask=sample_mask)
    tl.store(argmax_ptr + row + sample, argmax, mask=sample_mask)
    return row_max


@jit
def cross_entropy_kernel(
    features_cast_ptr, weight_ptr, bias_ptr, local_cast_ptr, partial_sq_norms_ptr, memory_ptr, labels_ptr,
    saved_logits_ptr, inv_norm_ptr, row_max_ptr, argmax_ptr, sums_ptr, label_logit_ptr,
    batch, classes, channels, feature_channels, parts, first_class, weight_stride_0, memory_stride_0,
    features_cast_stride_0, features_cast_stride_1, local_cast_stride_0, local_cast_stride_1, local_cast_stride_2,
    partial_sq_norms_stride_1, saved_logits_stride_0, saved_logits_stride_1, partial_row,
    STRIPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N classes x BLOCK_B samples; tiles of the same classes are neighbours, so that L2 serves
    classifier and memory.

    features_cast_ptr: (B, C), any strides, in the memory's dtype
    weight_ptr: (N, C), C contiguous, any dtype
    bias_ptr: (N,) or None
    local_cast_ptr: (B, n, C'), any strides, in the memory's dtype
    partial_sq_norms_ptr: (n, parts, at least B) float32
    memory_ptr: (n, N, C'), a class contiguous
    labels_ptr: (B,), any integer
    Result, unless None:
    saved_logits_ptr: (n+1, N, at least B) float32, logits, then each stripe's scores; of no meaning beyond B
    Results, all None or none:
    inv_norm_ptr: (n, B) float32, 1 / max(||f_i||, 1e-12)
    row_max_ptr: (class tiles, n+1, partial_row) float32, of the revised logits and of each stripe's scores
    argmax_ptr: the same, int32, counted from first_class
    sums_ptr: (class tiles, 2, partial_row) float32, sum of exp(revised - row_max), sum of the revised logits
    label_logit_ptr: (B,) float32, the label's revised logit, stored where the label is one of these classes
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    class_tile = tl.program_id(0) // batch_tiles
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    sample_mask = sample < batch
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    class_mask = identity < classes
    identity_wide = identity.to(tl.int64)[:, None]
    mask = class_mask[:, None] & sample_mask[None, :]
    saved_mask = class_mask[:, None] & (sample < saved_logits_stride_1)[None, :]
    saved_offsets = identity_wide * saved_logits_stride_1 + sample[None, :]
    saved_stride = tl.cast(saved_logits_stride_0, tl.int64)
    partial = tl.cast(class_tile, tl.int64) * (STRIPES + 1) * partial_row
    log_weight = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for stripe in range(STRIPES):
        score = multiply(
            memory_ptr + tl.cast(stripe, tl.int64) * memory_stride_0 + identity_wide * channels,
            local_cast_ptr + tl.cast(stripe, tl.int64) * local_cast_stride_1 + sample[None, :] * local_cast_stride_0,
            class_mask, sample_mask, 0, channels, channels, 1, local_cast_stride_2,
            tl.zeros([BLOCK_N, BLOCK_B], tl.float32), memory_ptr.dtype.element_ty, PRECISION, BLOCK_K,
        )  # fmt: skip
        sq_norms = sum_parts(
            partial_sq_norms_ptr, partial_sq_norms_stride_1, sample, sample_mask, stripe, parts, BLOCK_B, BLOCK_PARTS
        )
        inv_norm = 1.0 / tl.maximum(tl.sqrt_rn(sq_norms), NORM_EPS)
        score *= inv_norm[None, :]
        if saved_logits_ptr is not None:
            tl.store(saved_logits_ptr + (stripe + 1) * saved_stride + saved_offsets, score, mask=saved_mask)
        if row_max_ptr is not None:
            if class_tile == 0:
                tl.store(inv_norm_ptr + stripe * batch + sample, inv_norm, mask=sample_mask)
            row = partial + (stripe + 1) * partial_row
            store_best(row_max_ptr, argmax_ptr, row, score, identity, class_mask, sample, sample_mask, FAR)
        log_weight += log_sigmoid(score)
    logit = multiply(
        weight_ptr + identity_wide * weight_stride_0, features_cast_ptr + sample[None, :] * features_cast_stride_0,
        class_mask, sample_mask, 0, feature_channels, feature_channels, 1, features_cast_stride_1,
        tl.zeros([BLOCK_N, BLOCK_B], tl.float32), memory_ptr.dtype.element_ty, PRECISION, BLOCK_W,
    )  # fmt: skip
    if bias_ptr is not None:
        logit += tl.load(bias_ptr + identity, mask=class_mask, other=0.0).to(tl.float32)[:, None]
    if saved_logits_ptr is not None:
        tl.store(saved_logits_ptr + saved_offsets, logit, mask=saved_mask)
    if row_max_ptr is not None:
        revised = product(logit, tl.exp(log_weight / STRIPES))
        row_max = store_best(row_max_ptr, argmax_ptr, partial, revised, identity, class_mask, sample, sample_mask, FAR)
        exponential = tl.where(class_mask[:, None], tl.exp(revised - row_max[None, :]), 0.0)
        row = tl.cast(class_tile, tl.int64) * 2 * partial_row
        tl.store(sums_ptr + row + sample, tl.sum(exponential, axis=0), mask=sample_mask)
        sum_logits = tl.sum(tl.where(class_mask[:, None], revised, 0.0), axis=0)
        tl.store(sums_ptr + row + partial_row + sample, sum_logits, mask=sample_mask)
        label = tl.load(labels_ptr + sample, mask=sample_mask, other=0).to(tl.int64) - first_class
        is_label = mask & (identity_wide == label[None, :])
        label_logit = tl.broadcast_to(label_logit_ptr + sample[None, :], [BLOCK_N, BLOCK_B])
        tl.store(label_logit, revised, mask=is_label)


@jit
def reduce_tiles_kernel(
    row_max_ptr, argmax_ptr, sums_ptr, label_logit_ptr, labels_ptr,
    all_row_max_ptr, all_argmax_ptr, all_sums_ptr, all_label_logit_ptr,
    loss_ptr, lse_ptr, correct_ptr, stripe_correct_ptr,
    batch, classes, tiles, first_class, all_classes, row_max_stride_1, label_smoothing,
    STRIPES: tl.constexpr, EARLIER: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_B samples of one classifier: 0 is the global one, i + 1 that of stripe i.

    row_max_ptr, argmax_ptr, sums_ptr, label_logit_ptr: what cross_entropy_kernel stored for the tiles of `classes`
        classes from first_class on
    labels_ptr: (B,), any integer
    Results, and read for the classes before these if EARLIER; None if loss_ptr is not, and there are none before:
    all_row_max_ptr: (n+1, B) float32
    all_argmax_ptr: (n+1, B) int64, counted from class 0
    all_sums_ptr: (2, B) float32
    all_label_logit_ptr: (B,) float32, 0 where the label is none of the classes gone over
    Results after the last classes, in place of the former, or None:
    loss_ptr, lse_ptr: (B,) float32; the loss is NaN for a label that is none of all_classes
    correct_ptr: (B,) bool
    stripe_correct_ptr: (B, n) bool
    """
    classifier = tl.program_id(0) % (STRIPES + 1)
    sample = (tl.program_id(0) // (STRIPES + 1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    sample_mask = sample < batch
    label = tl.load(labels_ptr + sample, mask=sample_mask, other=0).to(tl.int64)
    is_here = sample_mask & (label >= first_class) & (label < first_class + classes)
    label_logit = tl.load(label_logit_ptr + sample, mask=is_here, other=0.0)
    row_max = tl.full([BLOCK_B], -float("inf"), tl.float32)
    argmax = tl.full([BLOCK_B], FAR, tl.int64)
    sum_exp = tl.zeros([BLOCK_B], tl.float32)
    sum_logits = tl.zeros([BLOCK_B], tl.float32)
    if EARLIER:
        row_max = tl.load(all_row_max_ptr + classifier * batch + sample, mask=sample_mask, other=0.0)
        argmax = tl.load(all_argmax_ptr + classifier * batch + sample, mask=sample_mask, other=0)
        if classifier == 0:  # the global classifier's program stores these, meanwhile: no other may read them
            sum_exp = tl.load(all_sums_ptr + sample, mask=sample_mask, other=0.0)
            sum_logits = tl.load(all_sums_ptr + batch + sample, mask=sample_mask, other=0.0)
            before = tl.load(all_label_logit_ptr + sample, mask=sample_mask & (is_here == 0), other=0.0)
            label_logit = before + label_logit
    for start in range(0, tiles, BLOCK_T):
        tile = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        mask = (tile < tiles) & sample_mask[None, :]
        offsets = (tile * (STRIPES + 1) + classifier) * row_max_stride_1 + sample[None, :]
        tile_max = tl.load(row_max_ptr + offsets, mask=mask, other=-float("inf"))
        tile_max = tl.where(sample_mask[None, :], tile_max, 0.0)  # so that nothing beyond the batch is NaN
        tile_argmax = tl.load(argmax_ptr + offsets, mask=mask, other=FAR)
        most = tl.max(tile_max, axis=0)
        best = tl.min(tl.where(tile_max == most[None, :], tile_argmax, FAR), axis=0)
        # the earlier one where they are equal: it is the lower
        argmax = tl.where(most > row_max, best.to(tl.int64) + first_class, argmax)
        new_max = tl.maximum(most, row_max)
        if classifier == 0:
            offsets = tile * 2 * row_max_stride_1 + sample[None, :]
            parts = tl.load(sums_ptr + offsets, mask=mask, other=0.0)
            scaled = product(parts, tl.exp(tile_max - new_max[None, :]))
            sum_exp = sum_exp * tl.exp(row_max - new_max) + tl.sum(scaled, axis=0)
            sum_logits += tl.sum(tl.load(sums_ptr + row_max_stride_1 + offsets, mask=mask, other=0.0), axis=0)
        row_max = new_max
    if loss_ptr is not None:
        is_valid = (label >= 0) & (label < all_classes)
        correct = is_valid & (argmax == label)
        if classifier == 0:
            lse = row_max + tl.log(tl.where(sample_mask, sum_exp, 1.0))
            loss = lse - (1.0 - label_smoothing) * label_logit - label_smoothing * (sum_logits / all_classes)
            tl.store(loss_ptr + sample, tl.where(is_valid, loss, float("nan")), mask=sample_mask)
            tl.store(lse_ptr + sample, lse, mask=sample_mask)
            tl.store(correct_ptr + sample, correct, mask=sample_mask)
        else:
            tl.store(stripe_correct_ptr + sample * STRIPES + (classifier - 1), correct, mask=sample_mask)
    else:
        row = classifier * batch + sample
        tl.store(all_row_max_ptr + row, row_max, mask=sample_mask)
        tl.store(all_argmax_ptr + row, argmax, mask=sample_mask)
        if classifier == 0:
            tl.store(all_sums_ptr + sample, sum_exp, mask=sample_mask)
            tl.store(all_sums_ptr + batch + sample, sum_logits, mask=sample_mask)
            tl.store(all_label_logit_ptr + sample, label_logit, mask=sample_mask)


def launch_cross_entropy(
    plan: Plan, inputs: Inputs, casts: Casts, saved_logits: Tensor | None, inv_norm: Tensor | None
) -> Statistics | None:
    """Fills saved_logits (n+1, rows, at least B) unless None; with inv_norm (n, B), fills it and returns statistics.

    These have a first axis of class tiles (but label_logit), at least B samples, and int32 classes from first_class on.
    """
    weight, memory = inputs.weight, inputs.memory

    def tiles() -> Tiles:
        return scores_tiles(current_target(memory), memory.dtype, len(inputs.features), memory.shape[1])

    def pieces() -> list[Piece]:
        batch, stripes, classes = inputs.sizes
        class_tiles, row = cdiv(classes, tiles()["BLOCK_N"]), score_row(batch)
        row_max = Piece((class_tiles, stripes + 1, row), torch.float32)
        argmax, sums = row_max._replace(dtype=torch.int32), Piece((class_tiles, 2, row), torch.float32)
        return [row_max, argmax, sums, Piece((batch,), torch.float32)]

    def prepare() -> tuple[int, Tiles, dict[str, Any]]:
        (batch, stripes, classes), chosen = inputs.sizes, tiles()
        parts = casts.partial_sq_norms.shape[1]
        scalars: dict[str, Any] = {
            "batch": batch,
            "classes": classes,
            "channels": memory.shape[2],
            "parts": parts,
            "STRIPES": stripes,
        }
        scalars |= {"feature_channels": weight.shape[1], "first_class": inputs.first_class}
        scalars |= {"partial_row": score_row(batch), "BLOCK_PARTS": block_of_parts(parts), "FAR": FAR}
        scalars["PRECISION"] = float32_precision(current_target(memory))
        # Float32 tiles of the shape of 16-bit ones would be loaded like these, eight numbers for each lane, and then
        # each request uses half of its sectors.
        scalars["BLOCK_W"] = chosen["BLOCK_K"] // (2 if weight.itemsize > memory.itemsize else 1)
        return cdiv(batch, chosen["BLOCK_B"]) * cdiv(classes, chosen["BLOCK_N"]), chosen, scalars

    partials = None if inv_norm is None else Statistics(*plan.scratch(weight, pieces))
    plan.launch(
        cross_entropy_kernel,
        {
            "features_cast": casts.features, "weight": weight, "bias": inputs.bias, "local_cast": casts.local,
            "partial_sq_norms": casts.partial_sq_norms, "memory": memory, "labels": inputs.labels,
            "saved_logits": saved_logits, "inv_norm": inv_norm, **as_dict(partials, Statistics),
        },
        prepare,
    )  # fmt: skip
    return partials


def launch_reduce_tiles(
    plan: Plan, partials: Statistics, inputs: Inputs, statistics: Statistics | None, loss: Loss | None, is_first: bool,
    label_smoothing: float,
) -> None:  # fmt: skip
    """Fills the loss or, if that is None, the statistics, which have those of the classes before unless it is_first."""

    def prepare() -> tuple[int, Tiles, dict[str, Any]]:
        batch, stripes, classes = inputs.sizes
        scalars: dict[str, Any] = {
            "batch": batch,
            "classes": classes,
            "tiles": len(partials.row_max),
            "STRIPES": stripes,
            "FAR": FAR,
        }
        scalars |= {"first_class": inputs.first_class, "all_classes": inputs.all_classes}
        scalars |= {"label_smoothing": label_smoothing, "EARLIER": not is_first}
        return cdiv(batch, REDUCE_TILES["BLOCK_B"]) * (stripes + 1), REDUCE_TILES, scalars

    known = as_dict(statistics, Statistics)
    plan.launch(
        reduce_tiles_kernel,
        {
            **partials._asdict(), "labels": inputs.labels, **{f"all_{name}": tensor for name, tensor in known.items()},
            **as_dict(loss, Loss),
        },
        prepare,
    )  # fmt: skip


def launch_forward(
    plan: Plan, features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor,
    bias: Tensor | None, label_smoothing: float | None, local_gradient: bool = True, first_class: int = 0,
    all_classes: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Goes over the classes, all at once if their logits are kept: `Loss` or, if label_smoothing is None, `Statistics`.

    Returns beside their fields saved_logits and inv_norm as in `Saved`.
    """
    stripes, classes, _ = memory.shape
    inputs = Inputs(features, weight, local_features, memory, labels, bias, first_class, all_classes or classes)
    inputs, batch = inputs.contiguous(), len(features)
    if parts := plan.once(lambda: kept_parts(batch, memory)):
        return split.launch_forward(plan, inputs, parts, label_smoothing)
    casts = cast_and_norm(plan, local_features, memory, features)
    saved_logits, inv_norm = empty_saved(batch, memory, torch.float32, on_triton=True)
    rows = saved_logits.shape[1]
    chunk = rows or chunk_of_statistics(batch, stripes, classes)
    loss = None if label_smoothing is None else empty_loss(features, stripes, torch.float32)
    statistics = None if loss and chunk >= classes else empty_statistics(features, stripes, torch.float32)
    for start in range(0, classes, chunk):
        end = min(start + chunk, classes)
        part = inputs if chunk >= classes else inputs.rows(slice(start, end))
        partials = launch_cross_entropy(plan, part, casts, saved_logits if rows else None, inv_norm)
        results = loss if end == classes else None
        launch_reduce_tiles(plan, partials, part, statistics, results, start == 0, label_smoothing or 0.0)
    return *(loss or statistics), saved_logits, inv_norm

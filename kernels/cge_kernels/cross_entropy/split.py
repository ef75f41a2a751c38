"""The forward of revised_cross_entropy where class tiles alone do not fill the machine; op.py has the formulas.

products: a program owns BLOCK_N classes x BLOCK_B samples of one classifier, and sums over a part of the channels.
loss: a program adds the parts of one sample, and has all its logits and scores, so that no second stage is needed.
Both have a sample's classes as neighbours. The parts are added in their order: the same bits from run to run.
"""

from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.budget import score_row
from cge_kernels.common.device_functions import NORM_EPS, jit, log_sigmoid, multiply, product, tl
from cge_kernels.common.launch import Tiles, current_target, float32_precision
from cge_kernels.common.plan import Piece, Plan
from cge_kernels.common.tiles import cdiv, loss_tiles, products_tiles
from cge_kernels.cross_entropy.inputs import Inputs, Loss, Statistics, as_dict, empty_loss, empty_statistics
from cge_kernels.revise_logits.forward import cast_and_norm

FAR = 2**31 - 1  # a class beyond all others


@jit
def classifier_products(
    features_ptr, feature_stride, feature_channel_stride, classes_ptr, class_stride, identity, sample, class_mask,
    sample_mask, channels, part, products_ptr, row, dtype: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stores products of features (B, channels) and rows of classes (N, channels) over one part of the channels.

    products_ptr: (B, row) float32; 0 beyond N
    """
    depth = tl.cdiv(tl.cdiv(channels, PARTS), BLOCK_K) * BLOCK_K
    first = part * depth
    end = tl.minimum(first + depth, channels)
    inside = sample_mask[:, None] & (identity < row)[None, :]
    pointers = products_ptr + sample[:, None] * row + identity[None, :]
    class_rows = classes_ptr + identity.to(tl.int64) * class_stride
    if PRECISION == "ieee":
        # Without tensor cores: lanes lie along samples, whose features come from different banks.
        products = multiply(
            class_rows[:, None], features_ptr + sample[None, :] * feature_stride, class_mask, sample_mask,
            first, end, channels, 1, feature_channel_stride, tl.zeros([BLOCK_N, BLOCK_B], tl.float32),
            dtype, PRECISION, BLOCK_K,
        )  # fmt: skip
        products = tl.trans(products)
    else:
        # Features are the factor that a tensor core takes from registers, where they are converted.
        products = multiply(
            features_ptr + sample[:, None] * feature_stride, class_rows[None, :], sample_mask, class_mask,
            first, end, channels, feature_channel_stride, 1, tl.zeros([BLOCK_B, BLOCK_N], tl.float32),
            dtype, PRECISION, BLOCK_K,
        )  # fmt: skip
    tl.store(pointers, products, mask=inside)


@jit
def products_kernel(
    features_ptr, weight_ptr, local_ptr, memory_ptr, products_ptr,
    batch, classes, channels, feature_channels, weight_stride_0, memory_stride_0, memory_stride_1,
    features_stride_0, features_stride_1, local_stride_0, local_stride_1, local_stride_2,
    products_stride_1, products_stride_2,
    STRIPES: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N classes x BLOCK_B samples of one classifier and one of PARTS parts of the channels.

    features_ptr: (B, C), any strides, any dtype
    weight_ptr: (N, C), C contiguous, any dtype
    local_ptr: (B, n, C'), any strides, any dtype
    memory_ptr: (n, N, C'), C' contiguous; in its dtype the products are taken
    products_ptr: (PARTS, n+1, B, row) float32, the result, of the classifier and then of the stripes; 0 beyond N
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    place = tl.program_id(0) // batch_tiles
    part = place % PARTS
    class_tiles = tl.cdiv(classes, BLOCK_N)
    class_tile = place // PARTS % class_tiles
    classifier = place // PARTS // class_tiles  # the global one comes first: its rows may be twice as long
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    identity = class_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    sample_mask = sample < batch
    class_mask = identity < classes
    result = products_ptr + (tl.cast(part, tl.int64) * (STRIPES + 1) + classifier) * products_stride_1
    dtype: tl.constexpr = memory_ptr.dtype.element_ty
    if classifier == 0:
        classifier_products(
            features_ptr, features_stride_0, features_stride_1, weight_ptr, weight_stride_0, identity, sample,
            class_mask, sample_mask, feature_channels, part, result, products_stride_2, dtype,
            PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_W,
        )  # fmt: skip
    else:
        stripe = tl.cast(classifier - 1, tl.int64)
        classifier_products(
            local_ptr + stripe * local_stride_1, local_stride_0, local_stride_2,
            memory_ptr + stripe * memory_stride_0, memory_stride_1, identity, sample,
            class_mask, sample_mask, channels, part, result, products_stride_2, dtype,
            PARTS, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@jit
def loss_kernel(
    products_ptr, bias_ptr, local_ptr, labels_ptr, saved_logits_ptr, inv_norm_ptr,
    row_max_ptr, argmax_ptr, sums_ptr, label_logit_ptr, loss_ptr, lse_ptr, correct_ptr, stripe_correct_ptr,
    batch, classes, channels, first_class, all_classes, label_smoothing,
    products_stride_0, products_stride_1, products_stride_2, local_stride_0, local_stride_1, local_stride_2,
    saved_logits_stride_0, saved_logits_stride_2,
    STRIPES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """One program for one sample and all classifiers, the global one and then those of the stripes.

    products_ptr: (PARTS, n+1, B, row) float32, what products_kernel stored
    bias_ptr: (N,) or None
    local_ptr: (B, n, C'), any strides
    labels_ptr: (B,), any integer, of all_classes; those here are `classes` from first_class on
    saved_logits_ptr: (n+1, row, B) float32, classes contiguous, a result; of no meaning beyond N
    inv_norm_ptr: (n, B) float32, 1 / max(||f_i||, 1e-12), a result too
    Further results, either these, whose label_logit is 0 where the label is none of the classes here:
    row_max_ptr: (n+1, B) float32
    argmax_ptr: (n+1, B) int64, counted from class 0
    sums_ptr: (2, B) float32
    label_logit_ptr: (B,) float32
    or these, where the former are None:
    loss_ptr, lse_ptr: (B,) float32; the loss is NaN for a label that is none of all_classes
    correct_ptr: (B,) bool
    stripe_correct_ptr: (B, n) bool
    """
    sample = tl.program_id(0).to(tl.int64)
    classifier = tl.arange(0, BLOCK_I).to(tl.int64)
    is_stripe = (classifier > 0) & (classifier <= STRIPES)
    is_global = classifier == 0
    stripe = classifier - 1
    squares = tl.zeros([BLOCK_I, BLOCK_C], tl.float32)
    local_rows = local_ptr + sample * local_stride_0 + stripe[:, None] * local_stride_1
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        local = tl.load(
            local_rows + channel.to(tl.int64)[None, :] * local_stride_2,
            mask=is_stripe[:, None] & (channel < channels)[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += product(local, local)
    inv_norm = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=1)), NORM_EPS)
    tl.store(inv_norm_ptr + stripe * batch + sample, inv_norm, mask=is_stripe)
    scale = tl.where(is_stripe, inv_norm, 1.0)

    label = tl.load(labels_ptr + sample).to(tl.int64)
    row_max = tl.full([BLOCK_I], -float("inf"), tl.float32)
    argmax = tl.full([BLOCK_I], FAR, tl.int32)
    revised_max = -float("inf")
    sum_exp = 0.0
    sum_logits = 0.0
    label_logit = 0.0
    for start in range(0, classes, BLOCK_N):
        identity = start + tl.arange(0, BLOCK_N)
        class_mask = identity < classes
        inside = (classifier <= STRIPES)[:, None] & (identity < products_stride_2)[None, :]
        offsets = classifier[:, None] * products_stride_1 + sample * products_stride_2 + identity[None, :]
        values = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
        for part in tl.static_range(PARTS):  # all loads before the first sum
            part_ptr = products_ptr + tl.cast(part, tl.int64) * products_stride_0
            values += tl.load(part_ptr + offsets, mask=inside, other=0.0)
        values *= scale[:, None]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + identity, mask=class_mask, other=0.0).to(tl.float32)
            values += tl.where(is_global[:, None], bias[None, :], 0.0)
        saved = classifier[:, None] * saved_logits_stride_0 + sample * saved_logits_stride_2 + identity[None, :]
        tl.store(saved_logits_ptr + saved, values, mask=inside)
        log_weight = tl.sum(tl.where(is_stripe[:, None], log_sigmoid(values), 0.0), axis=0)
        logit = tl.sum(tl.where(is_global[:, None], values, 0.0), axis=0)
        revised = product(logit, tl.exp(log_weight / STRIPES))
        values = tl.where(is_global[:, None], revised[None, :], values)
        values = tl.where(class_mask[None, :], values, -float("inf"))
        block_max = tl.max(values, axis=1)
        best = tl.min(tl.where(values == block_max[:, None], identity[None, :], FAR), axis=1)
        argmax = tl.where(block_max > row_max, best, argmax)  # the earlier one where they are equal: it is the lower
        row_max = tl.maximum(row_max, block_max)
        before = revised_max
        revised_max = tl.max(tl.where(is_global, row_max, -float("inf")), axis=0)
        exponential = tl.where(class_mask, tl.exp(revised - revised_max), 0.0)
        sum_exp = sum_exp * tl.exp(before - revised_max) + tl.sum(exponential, axis=0)
        sum_logits += tl.sum(tl.where(class_mask, revised, 0.0), axis=0)
        is_label = class_mask & (identity + first_class == label)
        label_logit += tl.sum(tl.where(is_label, revised, 0.0), axis=0)

    argmax = argmax.to(tl.int64) + first_class
    if loss_ptr is not None:
        is_valid = (label >= 0) & (label < all_classes)
        correct = (is_valid & (argmax == label)).to(tl.int32)
        lse = revised_max + tl.log(sum_exp)
        loss = lse - (1.0 - label_smoothing) * label_logit - label_smoothing * (sum_logits / all_classes)
        tl.store(loss_ptr + sample, tl.where(is_valid, loss, float("nan")))
        tl.store(lse_ptr + sample, lse)
        tl.store(correct_ptr + sample, tl.sum(tl.where(is_global, correct, 0), axis=0))
        tl.store(stripe_correct_ptr + sample * STRIPES + stripe, correct, mask=is_stripe)
    else:
        tl.store(row_max_ptr + classifier * batch + sample, row_max, mask=classifier <= STRIPES)
        tl.store(argmax_ptr + classifier * batch + sample, argmax, mask=classifier <= STRIPES)
        tl.store(sums_ptr + sample, sum_exp)
        tl.store(sums_ptr + batch + sample, sum_logits)
        tl.store(label_logit_ptr + sample, label_logit)


def launch_forward(plan: Plan, inputs: Inputs, parts: int, label_smoothing: float | None) -> tuple[Tensor, ...]:
    """The fields of `Loss` or, if label_smoothing is None, of `Statistics`; saved_logits and inv_norm as in `Saved`."""
    features, weight, local, memory = inputs.features, inputs.weight, inputs.local_features, inputs.memory
    batch, (stripes, classes, channels) = features.shape[0], memory.shape

    def settings() -> tuple[Tiles, str]:
        target = current_target(memory)
        return products_tiles(target, memory.dtype, batch), float32_precision(target)

    def prepare_products() -> tuple[int, Tiles, dict[str, Any]]:
        tiles, precision = settings()
        tiles_of_each = cdiv(batch, tiles["BLOCK_B"]) * cdiv(classes, tiles["BLOCK_N"])
        scalars: dict[str, Any] = {
            "batch": batch,
            "classes": classes,
            "channels": channels,
            "feature_channels": weight.shape[1],
        }
        scalars |= {"STRIPES": stripes, "PARTS": parts, "PRECISION": precision}
        # Float32 tiles of the shape of 16-bit ones would be loaded like these, eight numbers for each lane, and then
        # each request uses half of its sectors.
        scalars["BLOCK_W"] = tiles["BLOCK_K"] // (2 if weight.itemsize > memory.itemsize else 1)
        return tiles_of_each * (stripes + 1) * parts, tiles, scalars

    def prepare_loss() -> tuple[int, Tiles, dict[str, Any]]:
        scalars: dict[str, Any] = {
            "batch": batch,
            "classes": classes,
            "channels": channels,
            "label_smoothing": label_smoothing or 0.0,
        }
        scalars |= {"first_class": inputs.first_class, "all_classes": inputs.all_classes}
        scalars |= {"STRIPES": stripes, "PARTS": parts, "FAR": FAR}
        return batch, loss_tiles(current_target(memory), stripes, classes, channels), scalars

    local_read, features_read = local, features
    if plan.once(lambda: memory.dtype == torch.float32 and settings()[1] == "ieee"):
        local_read, _, features_read = cast_and_norm(plan, local, memory, features)  # into rows of samples
    row = score_row(classes)
    (products,) = plan.scratch(memory, lambda: [Piece((parts, stripes + 1, batch, row), torch.float32)])
    plan.launch(
        products_kernel,
        {"features": features_read, "weight": weight, "local": local_read, "memory": memory, "products": products},
        prepare_products,
    )  # fmt: skip
    saved_logits = memory.new_empty((stripes + 1, batch, row), dtype=torch.float32).transpose(1, 2)
    inv_norm = memory.new_empty((stripes, batch), dtype=torch.float32)
    loss = None if label_smoothing is None else empty_loss(features, stripes, torch.float32)
    statistics = None if loss else empty_statistics(features, stripes, torch.float32)
    plan.launch(
        loss_kernel,
        {
            "products": products, "bias": inputs.bias, "local": local, "labels": inputs.labels,
            "saved_logits": saved_logits, "inv_norm": inv_norm, **as_dict(statistics, Statistics),
            **as_dict(loss, Loss),
        },
        prepare_loss,
    )  # fmt: skip
    return *(loss or statistics), saved_logits, inv_norm

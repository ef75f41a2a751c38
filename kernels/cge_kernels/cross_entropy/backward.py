"""The backward of revised_cross_entropy; op.py has the formulas.

For each chunk of classes: their logits and scores, unless the forward kept them (cross_entropy_kernel once more); their
gradients and the casts of what they are multiplied with (grad_logits, elementwise); and library matmuls, which make of
these the chunk's rows of dW and its part of df and of the local features' gradient. In the end the latter goes through
the normalisation (normalize_backward).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cge_kernels.common.budget import chunk_of_logits, empty_logits, lie_by_sample, score_row
from cge_kernels.common.device_functions import NORM_EPS, jit, log_sigmoid, product, tl
from cge_kernels.common.dispatch import is_traced
from cge_kernels.common.launch import Tiles, current_target
from cge_kernels.common.plan import Plan, run
from cge_kernels.common.tiles import GRAD_LOGITS, cdiv, row_tiles
from cge_kernels.cross_entropy.cpu import revised_cross_entropy_backward as on_cpu
from cge_kernels.cross_entropy.forward import launch_cross_entropy
from cge_kernels.cross_entropy.inputs import Inputs, Saved
from cge_kernels.revise_logits.forward import cast_and_norm


@jit
def cast_block(tensor_ptr, cast_ptr, block, size, BLOCK: tl.constexpr):
    """Converts one block of `size` numbers."""
    offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(cast_ptr + offsets, tl.load(tensor_ptr + offsets, mask=mask, other=0.0), mask=mask)


@jit
def grad_logits_tile(
    grad_ptr, lse_ptr, labels_ptr, saved_logits_ptr, grad_logits_ptr, program,
    batch, end_class, grad_stride_0, saved_logits_stride_0, saved_logits_stride_1, saved_logits_stride_2,
    grad_logits_stride_0, grad_logits_stride_1, grad_logits_stride_2, first_class, all_classes, label_smoothing,
    STRIPES: tl.constexpr, LOCAL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N classes x BLOCK_B samples; pointers as in grad_logits_kernel."""
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    sample = (program % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    identity = (program // batch_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    sample_mask = sample < batch
    mask = (identity < end_class)[:, None] & sample_mask[None, :]
    offsets = identity[:, None] * saved_logits_stride_1 + sample[None, :] * saved_logits_stride_2
    grad_offsets = identity[:, None] * grad_logits_stride_1 + sample[None, :] * grad_logits_stride_2
    saved_stride = tl.cast(saved_logits_stride_0, tl.int64)
    grad_stride = tl.cast(grad_logits_stride_0, tl.int64)
    log_weight = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for stripe in range(STRIPES):
        score = tl.load(saved_logits_ptr + (stripe + 1) * saved_stride + offsets, mask=mask, other=0.0)
        log_weight += log_sigmoid(score)
    weight = tl.exp(log_weight / STRIPES)
    revised = tl.load(saved_logits_ptr + offsets, mask=mask, other=0.0) * weight
    label = tl.load(labels_ptr + sample, mask=sample_mask, other=-1).to(tl.int64)
    is_valid = sample_mask & (label >= 0) & (label < all_classes)
    grad = tl.load(grad_ptr + sample * grad_stride_0, mask=is_valid, other=0.0)
    lse = tl.load(lse_ptr + sample, mask=sample_mask, other=0.0)
    is_label = identity[:, None] + first_class == label[None, :]
    target = label_smoothing / all_classes + tl.where(is_label, 1.0 - label_smoothing, 0.0)
    grad_revised = grad.to(tl.float32)[None, :] * (tl.exp(revised - lse[None, :]) - target)
    tl.store(grad_logits_ptr + grad_offsets, grad_revised * weight, mask=mask)
    if LOCAL:
        common = grad_revised * revised / STRIPES
        for stripe in range(STRIPES):
            score = tl.load(saved_logits_ptr + (stripe + 1) * saved_stride + offsets, mask=mask, other=0.0)
            grad_score = common / (1.0 + tl.exp(score))
            tl.store(grad_logits_ptr + (stripe + 1) * grad_stride + grad_offsets, grad_score, mask=mask)


OPERATOR = "revised_cross_entropy_backward"


@jit
def grad_logits_kernel(
    grad_ptr, lse_ptr, labels_ptr, saved_logits_ptr, grad_logits_ptr,
    features_ptr, features_cast_ptr, weight_ptr, weight_cast_ptr,
    batch, end_class, grad_stride_0, saved_logits_stride_0, saved_logits_stride_1, saved_logits_stride_2,
    grad_logits_stride_0, grad_logits_stride_1, grad_logits_stride_2, first_class, all_classes, label_smoothing,
    tiles, features_blocks, features_size, weight_size,
    STRIPES: tl.constexpr, LOCAL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`tiles` programs for BLOCK_N classes x BLOCK_B samples each; then features_blocks ones for BLOCK numbers of the
    features each; the rest for BLOCK numbers of the classifier each.

    grad_ptr: (B,) float32, any stride
    lse_ptr: (B,) float32
    labels_ptr: (B,), any integer, of all_classes
    saved_logits_ptr: (n+1, at least end_class, at least B) float32, logits and scores of classes from first_class on;
        samples or classes contiguous
    grad_logits_ptr: (n+1 or, unless LOCAL, 1, at least end_class, at least B) in the matmuls' dtype, a result:
        gradients of the logits, then of each stripe's scores; what is contiguous is the same
    features_ptr, features_cast_ptr: (B, C), contiguous, and the result in the matmuls' dtype; or both None
    weight_ptr, weight_cast_ptr: (classes, C), contiguous, and the result in the matmuls' dtype; or both None
    end_class: how many classes or, so that several can be loaded at once, a multiple of 16 that is not below
    """
    program = tl.program_id(0)
    if program < tiles:
        grad_logits_tile(
            grad_ptr, lse_ptr, labels_ptr, saved_logits_ptr, grad_logits_ptr, program,
            batch, end_class, grad_stride_0, saved_logits_stride_0, saved_logits_stride_1, saved_logits_stride_2,
            grad_logits_stride_0, grad_logits_stride_1, grad_logits_stride_2, first_class, all_classes,
            label_smoothing, STRIPES, LOCAL, BLOCK_B, BLOCK_N,
        )  # fmt: skip
    elif program < tiles + features_blocks:
        if features_cast_ptr is not None:
            cast_block(features_ptr, features_cast_ptr, program - tiles, features_size, BLOCK)
    elif weight_cast_ptr is not None:
        cast_block(weight_ptr, weight_cast_ptr, program - tiles - features_blocks, weight_size, BLOCK)


@jit
def normalize_backward_kernel(
    sums_ptr, local_ptr, inv_norm_ptr, grad_local_ptr, batch, channels, local_stride_0, local_stride_1, local_stride_2,
    STRIPES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program for one stripe of one sample: (g - u <u, g>) / ||f||, u = f / ||f||.

    sums_ptr: (n, B, C) float32, the gradient g of u
    local_ptr: (B, n, C), any strides, f
    inv_norm_ptr: (n, B) float32, 1 / ||f||
    grad_local_ptr: (B, n, C), contiguous, the result
    """
    sample = tl.program_id(0) // STRIPES
    stripe = tl.program_id(0) % STRIPES
    channel = tl.arange(0, BLOCK_C)
    mask = channel < channels
    row = tl.cast(stripe * batch + sample, tl.int64)
    grad = tl.load(sums_ptr + row * channels + channel, mask=mask, other=0.0)
    offsets = (
        tl.cast(sample, tl.int64) * local_stride_0 + stripe * local_stride_1 + channel.to(tl.int64) * local_stride_2
    )
    local = tl.load(local_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    inv_norm = tl.load(inv_norm_ptr + row)
    along = tl.sum(product(grad, local * inv_norm), axis=0)
    # Below the bound the length is a constant: nothing to project out.
    along = tl.where(inv_norm * NORM_EPS < 0.999999, along * inv_norm, 0.0)
    result = (grad - local * along) * inv_norm
    tl.store(grad_local_ptr + tl.cast(tl.program_id(0), tl.int64) * channels + channel, result, mask=mask)


def launch_grad_logits(
    plan: Plan, inputs: Inputs, grad: Tensor, lse: Tensor, saved_logits: Tensor, grad_logits: Tensor,
    features_cast: Tensor | None, weight_cast: Tensor | None, label_smoothing: float,
) -> None:  # fmt: skip
    """Fills grad_logits (n+1 or 1, at least rows, at least B) from saved_logits (n+1, at least rows, at least B).

    And what is not None of features_cast (B, C) and weight_cast (rows, C), in their dtype.
    """
    features, weight = inputs.features, inputs.weight

    def prepare() -> tuple[int, Tiles, dict[str, Any]]:
        (batch, stripes, classes), by_sample = inputs.sizes, lie_by_sample(saved_logits)
        tiles = GRAD_LOGITS["by sample" if by_sample else "by class"]
        scalars: dict[str, Any] = {"batch": batch, "end_class": score_row(classes) if by_sample else classes}
        scalars |= {"first_class": inputs.first_class, "all_classes": inputs.all_classes}
        scalars |= {"label_smoothing": label_smoothing, "STRIPES": stripes, "LOCAL": len(grad_logits) > 1}
        scalars |= {"tiles": cdiv(batch, tiles["BLOCK_B"]) * cdiv(classes, tiles["BLOCK_N"])}
        sizes = [0 if cast is None else cast.numel() for cast in (features_cast, weight_cast)]
        blocks = [cdiv(size, tiles["BLOCK"]) for size in sizes]
        scalars |= {"features_blocks": blocks[0], "features_size": sizes[0], "weight_size": sizes[1]}
        return scalars["tiles"] + sum(blocks), tiles, scalars

    plan.launch(
        grad_logits_kernel,
        {
            "grad": grad, "lse": lse, "labels": inputs.labels, "saved_logits": saved_logits, "grad_logits": grad_logits,
            "features": None if features_cast is None else features, "features_cast": features_cast,
            "weight": None if weight_cast is None else weight, "weight_cast": weight_cast,
        },
        prepare,
    )  # fmt: skip


def launch_normalize_backward(plan: Plan, sums: Tensor, local_features: Tensor, inv_norm: Tensor) -> Tensor:
    """The local features' gradient (B, n, C) from sums (n, B, C), the gradient of what has length one."""
    grad_local = torch.empty_like(local_features, memory_format=torch.contiguous_format)

    def prepare() -> tuple[int, Tiles, dict[str, Any]]:
        batch, stripes, channels = local_features.shape
        tiles = row_tiles(current_target(sums), channels)
        return batch * stripes, tiles, {"batch": batch, "channels": channels, "STRIPES": stripes}

    plan.launch(
        normalize_backward_kernel,
        {"sums": sums, "local": local_features, "inv_norm": inv_norm, "grad_local": grad_local},
        prepare,
    )  # fmt: skip
    return grad_local


def product_(total: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """total (m, n) or (g, m, n) float32 = a @ b, or += if it adds; a and b of one dtype.

    A library's matmul with float32 results. Only on the CPU, which has no such product of 16-bit operands, are these
    converted first; whoever watches operations sees one nevertheless.
    """
    (product_op if torch._C._len_torch_dispatch_stack() else multiply_into)(total, a, b, adds)


def multiply_into(total: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    multiply, add = (torch.bmm, torch.baddbmm) if total.dim() == 3 else (torch.mm, torch.addmm)
    if a.dtype != torch.float32 and not a.is_cuda:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        add(total, a, b, out=total) if adds else multiply(a, b, out=total)
    elif adds:
        total.add_(multiply(a, b, out_dtype=torch.float32))
    else:
        multiply(a, b, out_dtype=torch.float32, out=total)


product_op = torch.library.custom_op("cge_kernels::product_", mutates_args=("total",))(multiply_into)


@product_op.register_fake
def _(total, a, b, adds):
    pass


def launch_backward(
    plan: Plan, inputs: Inputs, grad: Tensor, saved: Saved, label_smoothing: float, local_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features (B, C), weight (N, C), local features (B, n, C') and bias (N,).

    Those of the local features are empty without local_gradient, those of the bias without one.
    """
    inputs = inputs.contiguous()._replace(features=inputs.features.contiguous())
    features, weight, memory, local = inputs.features, inputs.weight, inputs.memory, inputs.local_features
    (batch, stripes, classes), channels = inputs.sizes, memory.shape[2]
    chunk = plan.once(lambda: chunk_of_logits(batch, stripes, classes))
    recomputes = saved.saved_logits.shape[1] == 0
    if recomputes:
        scratch = features.new_empty((stripes + 1, chunk, score_row(batch)), dtype=torch.float32)
        casts = cast_and_norm(plan, local, memory, features)
    features_cast = None if features.dtype == memory.dtype else torch.empty_like(features, dtype=memory.dtype)
    in_float32, casts_weight = weight.dtype == torch.float32, weight.dtype != memory.dtype
    sizes = (stripes + 1 if local_gradient else 1, chunk, batch)
    grad_logits = empty_logits(features, sizes, memory.dtype, lie_by_sample(saved.saved_logits))
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0) if inputs.bias is None else torch.empty_like(inputs.bias)
    grad_features = features.new_empty(features.shape, dtype=torch.float32)
    sums = features.new_empty((stripes, batch, channels), dtype=torch.float32) if local_gradient else None
    for start in range(0, classes, chunk):
        rows = slice(start, min(start + chunk, classes))
        part = inputs if chunk >= classes else inputs.rows(rows)
        if recomputes:
            launch_cross_entropy(plan, part, casts, scratch, None)
        saved_logits = scratch if recomputes else saved.saved_logits
        if not (recomputes or part is inputs):
            saved_logits = saved_logits[:, start : start + score_row(chunk)]
        cast = torch.empty_like(part.weight, dtype=memory.dtype) if casts_weight else None
        launch_grad_logits(
            plan, part, grad, saved.lse, saved_logits, grad_logits, None if start else features_cast, cast,
            label_smoothing,
        )  # fmt: skip
        gradients = grad_logits[:, : rows.stop - start, :batch].transpose(1, 2)
        grad_rows = grad_weight[rows] if in_float32 else torch.empty_like(part.weight, dtype=torch.float32)
        product_(grad_rows, gradients[0].T, features if features_cast is None else features_cast, False)
        if not in_float32:
            grad_weight[rows] = grad_rows
        product_(grad_features, gradients[0], part.weight if cast is None else cast, start > 0)
        if local_gradient:
            product_(sums, gradients[1:], part.memory, start > 0)
        if inputs.bias is not None:
            grad_bias[rows] = gradients[0].sum(dim=0, dtype=torch.float32)
    grad_local = launch_normalize_backward(plan, sums, local, saved.inv_norm) if local_gradient else local.new_empty(0)
    return grad_features.to(features.dtype), grad_weight, grad_local, grad_bias


def cross_entropy_backward(
    grad: Tensor, saved: Sequence[Tensor | None], label_smoothing: float, first_class: int, all_classes: int,
    local_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What launch_backward gives; saved: lse, the tensors of `Inputs`, saved_logits and inv_norm."""
    if is_traced(grad, *saved):
        return cross_entropy_backward_op(grad, *saved, label_smoothing, first_class, all_classes, local_gradient)
    lse, *tensors, saved_logits, inv_norm = saved
    inputs = Inputs._make([*tensors, first_class, all_classes])
    kept = Saved(lse, saved_logits, inv_norm)
    return run(OPERATOR, launch_backward, on_cpu, inputs, grad, kept, label_smoothing, local_gradient)


@torch.library.custom_op("cge_kernels::revised_cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(
    grad: Tensor, lse: Tensor, features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor,
    labels: Tensor, bias: Tensor | None, saved_logits: Tensor, inv_norm: Tensor, label_smoothing: float,
    first_class: int, all_classes: int, local_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Inputs(features, weight, local_features, memory, labels, bias, first_class, all_classes)
    kept = Saved(lse, saved_logits, inv_norm)
    return run(OPERATOR, launch_backward, on_cpu, inputs, grad, kept, label_smoothing, local_gradient)


@cross_entropy_backward_op.register_fake
def _(
    grad, lse, features, weight, local_features, memory, labels, bias, saved_logits, inv_norm, label_smoothing,
    first_class, all_classes, local_gradient,
):  # fmt: skip
    return (
        torch.empty_like(features, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        local_features.new_empty(local_features.shape if local_gradient else 0),
        weight.new_empty(0) if bias is None else torch.empty_like(bias),
    )

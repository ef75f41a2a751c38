"""The backward of revised_cross_entropy; revised_cross_entropy.py has the formulas.

For each chunk of classes: their logits and scores, unless the forward kept them (cross_entropy_kernel once more); their
gradients (grad_logits, elementwise); and library matmuls, which make of these the chunk's rows of dW and its part of df
and of the local features' gradient. In the end the latter goes through the normalisation (project).
"""

import torch
from torch import Tensor

from cge_kernels.common.device_functions import jit, product, tl
from cge_kernels.common.dispatch import implementation
from cge_kernels.common.launch import current_target, launch
from cge_kernels.common.tiles import (
    GRAD_LOGITS,
    cdiv,
    chunk_of_logits,
    project_configuration,
    score_row,
)
from cge_kernels.cross_entropy import cpu
from cge_kernels.cross_entropy.forward import launch_cross_entropy
from cge_kernels.revise_logits.forward import NORM_EPS, log_sigmoid, prepare


@jit
def grad_logits_kernel(
    grad_pointer, log_sum_pointer, labels_pointer, kept_pointer, gradients_pointer,
    batch, classes, kept_rows, kept_row, grad_rows, first_class, all_classes, label_smoothing,
    STRIPES: tl.constexpr, LOCAL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_N classes x BLOCK_B samples.

    grad, log_sum (B,) float32; labels (B,), any integer, of all_classes; kept (n+1, kept_rows, kept_row) float32,
    logits and scores of `classes` classes from first_class on -> gradients (n+1 or, unless LOCAL, 1, grad_rows,
    kept_row) in the matmuls' dtype: of the logits, then of each stripe's scores.
    """
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    sample = (tl.program_id(0) % batch_tiles * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    identity = (tl.program_id(0) // batch_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    sample_mask = sample < batch
    mask = (identity < classes)[:, None] & sample_mask[None, :]
    offsets = identity[:, None] * kept_row + sample[None, :]
    kept_stride = tl.cast(kept_rows, tl.int64) * kept_row
    grad_stride = tl.cast(grad_rows, tl.int64) * kept_row
    log_weight = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for stripe in range(STRIPES):
        log_weight += log_sigmoid(tl.load(kept_pointer + (stripe + 1) * kept_stride + offsets, mask=mask, other=0.0))
    weight = tl.exp(log_weight / STRIPES)
    revised = tl.load(kept_pointer + offsets, mask=mask, other=0.0) * weight
    label = tl.load(labels_pointer + sample, mask=sample_mask, other=-1).to(tl.int64)
    grad = tl.load(grad_pointer + sample, mask=sample_mask & (label >= 0) & (label < all_classes), other=0.0)
    log_sum = tl.load(log_sum_pointer + sample, mask=sample_mask, other=0.0)
    is_label = identity[:, None] + first_class == label[None, :]
    target = label_smoothing / all_classes + tl.where(is_label, 1.0 - label_smoothing, 0.0)
    grad_revised = grad.to(tl.float32)[None, :] * (tl.exp(revised - log_sum[None, :]) - target)
    tl.store(gradients_pointer + offsets, grad_revised * weight, mask=mask)
    if LOCAL:
        common = grad_revised * revised / STRIPES
        for stripe in range(STRIPES):
            score = tl.load(kept_pointer + (stripe + 1) * kept_stride + offsets, mask=mask, other=0.0)
            grad_score = common / (1.0 + tl.exp(score))
            tl.store(gradients_pointer + (stripe + 1) * grad_stride + offsets, grad_score, mask=mask)


@jit
def project_kernel(
    sums_pointer, local_pointer, scale_pointer, grad_local_pointer, batch, channels, stride_b, stride_i, stride_c,
    STRIPES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program for one stripe of one sample: (g - u <u, g>) / ||f||, u = f / ||f||.

    sums (n, B, C) float32, the gradient g of u; local (B, n, C), any strides, f; scale (n, B) float32 -> grad_local
    (B, n, C), contiguous.
    """
    sample = tl.program_id(0) // STRIPES
    stripe = tl.program_id(0) % STRIPES
    channel = tl.arange(0, BLOCK_C)
    mask = channel < channels
    row = tl.cast(stripe * batch + sample, tl.int64)
    gradient = tl.load(sums_pointer + row * channels + channel, mask=mask, other=0.0)
    offsets = tl.cast(sample, tl.int64) * stride_b + stripe * stride_i + channel.to(tl.int64) * stride_c
    local = tl.load(local_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_pointer + row)
    along = tl.sum(product(gradient, local * scale), axis=0)
    # Below the bound the length is a constant: nothing to project out.
    along = tl.where(scale * NORM_EPS < 0.999999, along * scale, 0.0)
    result = (gradient - local * along) * scale
    tl.store(grad_local_pointer + tl.cast(tl.program_id(0), tl.int64) * channels + channel, result, mask=mask)


def launch_grad_logits(
    grad: Tensor, log_sum: Tensor, labels: Tensor, kept: Tensor, classes: int, grad_logits: Tensor, first_class: int,
    all_classes: int, label_smoothing: float, stripes: int,
) -> None:  # fmt: skip
    """Fills grad_logits (n+1 or 1, rows, at least B) for the classes that kept (n+1, rows, at least B) begins with."""
    args = {
        "grad_pointer": grad,
        "log_sum_pointer": log_sum,
        "labels_pointer": labels,
        "kept_pointer": kept,
        "gradients_pointer": grad_logits,
        "batch": len(labels),
        "classes": classes,
        "kept_rows": kept.stride(0) // kept.stride(1),
        "kept_row": kept.shape[2],
        "grad_rows": grad_logits.shape[1],
        "first_class": first_class,
        "all_classes": all_classes,
        "label_smoothing": label_smoothing,
    }
    constants = {"STRIPES": stripes, "LOCAL": len(grad_logits) > 1, **GRAD_LOGITS.blocks}
    tiles = cdiv(len(labels), GRAD_LOGITS.blocks["BLOCK_B"]) * cdiv(classes, GRAD_LOGITS.blocks["BLOCK_N"])
    launch(grad_logits_kernel, (tiles,), args, constants, GRAD_LOGITS.options)


def launch_project(sums: Tensor, local_features: Tensor, scale: Tensor) -> Tensor:
    """The local features' gradient (B, n, C) from sums (n, B, C), the gradient of what has length one."""
    batch, stripes, channels = local_features.shape
    grad_local = torch.empty_like(local_features, memory_format=torch.contiguous_format)
    args = {
        "sums_pointer": sums,
        "local_pointer": local_features,
        "scale_pointer": scale,
        "grad_local_pointer": grad_local,
        "batch": batch,
        "channels": channels,
        "stride_b": local_features.stride(0),
        "stride_i": local_features.stride(1),
        "stride_c": local_features.stride(2),
    }
    chosen = project_configuration(current_target(sums), channels)
    launch(project_kernel, (batch * stripes,), args, {"STRIPES": stripes, **chosen.blocks}, chosen.options)
    return grad_local


@torch.library.custom_op("cge_kernels::product_", mutates_args=("total",))
def product_(total: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """total (g, m, n) float32 = a @ b, or += if it adds; a (g, m, k) and b (g, k, n) of one dtype.

    A library's matmul with float32 results. Opaque, so that whoever counts operations sees one: only on the CPU, which
    has no such product of 16-bit operands, are these converted first.
    """
    if a.dtype == torch.float32 or not a.is_cuda:
        a, b = a.float(), b.float()
        torch.baddbmm(total, a, b, out=total) if adds else torch.bmm(a, b, out=total)
    elif adds:
        total.add_(torch.bmm(a, b, out_dtype=torch.float32))
    else:
        torch.bmm(a, b, out_dtype=torch.float32, out=total)


@product_.register_fake
def _(total, a, b, adds):
    pass


def launch_backward(
    grad: Tensor, log_sum: Tensor, features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor,
    labels: Tensor, bias: Tensor | None, kept: Tensor, scale: Tensor, label_smoothing: float, first_class: int,
    all_classes: int, local_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of features (B, C), weight (N, C), local features (B, n, C') and bias (N,).

    Those of the local features are empty without local_gradient, those of the bias without one.
    """
    stripes, classes, channels = memory.shape
    labels, weight = labels.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    batch, row = len(features), score_row(len(features))
    chunk = chunk_of_logits(batch, stripes, classes)
    scratch, feature_operand = None, features.to(memory.dtype)
    if not kept.shape[1]:
        scratch = features.new_empty(stripes + 1, chunk, row, dtype=torch.float32)
        operand, squares, column_operand = prepare(local_features, memory, features)
    grad_logits = features.new_empty(stripes + 1 if local_gradient else 1, chunk, row, dtype=memory.dtype)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    grad_features = features.new_empty(1, batch, features.shape[1], dtype=torch.float32)
    sums = local_features.new_empty(stripes if local_gradient else 0, batch, channels, dtype=torch.float32)
    for start in range(0, classes, chunk):
        part = slice(start, min(start + chunk, classes))
        size = part.stop - start
        rows, weight_rows = memory[:, part], weight[part]
        if scratch is not None:
            chunk_bias = None if bias is None else bias[part]
            launch_cross_entropy(
                column_operand, weight_rows, chunk_bias, operand, squares, rows, labels, 0, scratch, None
            )
        scores = kept[:, part] if scratch is None else scratch
        first = first_class + start
        launch_grad_logits(
            grad, log_sum, labels, scores, size, grad_logits, first, all_classes, label_smoothing, stripes
        )
        gradients = grad_logits[:, :size, :batch]
        in_float32 = weight.dtype == torch.float32
        grad_rows = grad_weight[None, part] if in_float32 else torch.empty_like(weight_rows[None], dtype=torch.float32)
        product_(grad_rows, gradients[:1], feature_operand[None], False)
        if not in_float32:
            grad_weight[part] = grad_rows[0]
        columns = gradients.transpose(1, 2)
        product_(grad_features, columns[:1], weight_rows[None].to(memory.dtype), start > 0)
        if local_gradient:
            product_(sums, columns[1:], rows, start > 0)
        if bias is not None:
            grad_bias[part] = gradients[0].sum(dim=1, dtype=torch.float32)
    grad_local = launch_project(sums, local_features, scale) if local_gradient else local_features.new_empty(0)
    return grad_features[0].to(features.dtype), grad_weight, grad_local, grad_bias


@torch.library.custom_op("cge_kernels::revised_cross_entropy_backward", mutates_args=())
def revised_cross_entropy_backward_op(
    grad: Tensor, log_sum: Tensor, features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor,
    labels: Tensor, bias: Tensor | None, kept: Tensor, scale: Tensor, label_smoothing: float, first_class: int,
    all_classes: int, local_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    run = implementation(launch_backward, cpu.revised_cross_entropy_backward, features, weight, local_features, memory)
    return run(
        grad, log_sum, features, weight, local_features, memory, labels, bias, kept, scale, label_smoothing,
        first_class, all_classes, local_gradient,
    )  # fmt: skip


@revised_cross_entropy_backward_op.register_fake
def _(
    grad, log_sum, features, weight, local_features, memory, labels, bias, kept, scale, label_smoothing, first_class,
    all_classes, local_gradient,
):  # fmt: skip
    return (
        torch.empty_like(features, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        local_features.new_empty(local_features.shape if local_gradient else 0),
        weight.new_empty(0) if bias is None else torch.empty_like(bias),
    )

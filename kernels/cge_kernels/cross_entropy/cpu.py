"""revised_cross_entropy for the CPU, one chunk of classes after the other.

Matrices of scores have classes as rows and samples as columns: a chunk of classes is then contiguous, and the products
with classifier and memory, whose rows are long, are taken the fast way around.
"""

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from cge_kernels.common.budget import chunk_of_logits, empty_saved
from cge_kernels.common.checks import accumulation_dtype, where_valid
from cge_kernels.cross_entropy.inputs import Inputs, Loss, Saved, Statistics
from cge_kernels.revise_logits.cpu import NORM_EPS, inverse_norms, weights_of

CHUNK = 2048  # classes whose scores of a usual batch stay in the cache while they are gone over


def chunks(
    inputs: Inputs, inv_norm: Tensor, saved_logits: Tensor, is_filled: bool
) -> Iterator[tuple[slice, Inputs, Tensor]]:
    """Rows, the inputs with these rows, and their logits and scores (n+1, rows, B).

    They are in saved_logits if that is filled; else they are computed, into it if it has rows, or into scratch that the
    next chunk takes again.
    """
    batch, stripes, classes = inputs.sizes
    memory_dtype, dtype = inputs.memory.dtype, inv_norm.dtype
    chunk = min(CHUNK, chunk_of_logits(batch, stripes + 2, classes))  # the backward has as many beside kept ones
    scratch = None if saved_logits.shape[1] else inv_norm.new_empty(stripes + 1, min(chunk, classes), batch)
    if not is_filled:
        columns = inputs.features.to(memory_dtype).to(dtype).T
        local = inputs.local_features.to(memory_dtype).to(dtype)
        local_columns = (local * inv_norm.T.unsqueeze(2)).permute(1, 2, 0)
    for start in range(0, classes, chunk):
        rows = slice(start, min(start + chunk, classes))
        part = inputs if chunk >= classes else inputs.rows(rows)
        scores = saved_logits[:, rows, :batch] if scratch is None else scratch[:, : rows.stop - start]
        if not is_filled:
            torch.mm(part.weight.to(memory_dtype).to(dtype), columns, out=scores[0])
            if part.bias is not None:
                scores[0] += part.bias.to(dtype).unsqueeze(1)
            for score, row, column in zip(scores[1:], part.memory, local_columns, strict=True):
                torch.mm(row.to(dtype), column, out=score)
        yield rows, part, scores


def places_of_labels(part: Inputs) -> tuple[Tensor, Tensor]:
    """(1, B) each: a row of the part for every sample, and whether it is that of the sample's label."""
    row = part.labels.unsqueeze(0)
    if part.first_class:
        row = row - part.first_class
    place = row.clamp(0, len(part.weight) - 1)
    return place, place == row


def sigmoids_of(scores: Tensor, is_kept: bool) -> Tensor:
    """Of the stripes' scores (n, rows, B), in their place unless these are kept for the backward."""
    return scores.sigmoid() if is_kept else scores.sigmoid_()


def statistics_of(part: Inputs, scores: Tensor, is_kept: bool) -> Statistics:
    """The statistics of the part's classes from their logits and scores (n+1, rows, B)."""
    row_max, argmax = scores.new_empty(scores[:, 0].shape), part.labels.new_empty(scores[:, 0].shape)
    sums = row_max.new_empty(2, row_max.shape[1])
    # In place of argmax, which takes twice as long as max with its index.
    torch.max(scores[1:], dim=1, out=(row_max[1:], argmax[1:]))
    revised = weights_of(sigmoids_of(scores[1:], is_kept)).mul_(scores[0])
    torch.max(revised, dim=0, out=(row_max[0], argmax[0]))
    place, is_label = places_of_labels(part)
    label_logit = torch.where(is_label, revised.gather(0, place), 0)[0]
    torch.sum(revised, dim=0, out=sums[1])
    torch.sum(revised.sub_(row_max[0]).exp_(), dim=0, out=sums[0])
    return Statistics(row_max, argmax + part.first_class if part.first_class else argmax, sums, label_logit)


def merged(lower: Statistics, higher: Statistics) -> Statistics:
    """The statistics over the classes of both; of classes that tie the lower one wins."""
    row_max = torch.maximum(lower.row_max, higher.row_max)
    argmax = torch.where(higher.row_max > lower.row_max, higher.argmax, lower.argmax)
    sums = lower.sums_below(row_max) + higher.sums_below(row_max)
    return Statistics(row_max, argmax, sums, lower.label_logit + higher.label_logit)


def revised_statistics(inputs: Inputs) -> tuple[Statistics, Tensor, Tensor]:
    """The statistics of the rows' classes, saved_logits and inv_norm as in `Saved`."""
    batch, _, _ = inputs.sizes
    dtype = accumulation_dtype(inputs.features, inputs.weight, inputs.local_features, inputs.memory)
    inv_norm = inverse_norms(inputs.local_features, dtype)
    saved_logits, _ = empty_saved(batch, inputs.memory, dtype, on_triton=False)
    if saved_logits.shape[2] > batch:
        saved_logits[:, :, batch:] = 0
    parts, is_kept = chunks(inputs, inv_norm, saved_logits, is_filled=False), saved_logits.shape[1] > 0
    return reduce(merged, (statistics_of(part, scores, is_kept) for _, part, scores in parts)), saved_logits, inv_norm


def loss_of_statistics(statistics: Statistics, labels: Tensor, classes: int, label_smoothing: float) -> Loss:
    """The loss from the statistics over all N classes."""
    row_max, argmax, (sum_exp, total), label_logit = statistics
    lse = sum_exp.log().add_(row_max[0])
    loss = torch.sub(lse, label_logit, alpha=1 - label_smoothing).sub_(total, alpha=label_smoothing / classes)
    loss = where_valid(loss, labels, classes, torch.nan)
    correct = argmax == labels
    return Loss(loss, lse, correct[0].clone(), correct[1:].T.contiguous())


def revised_cross_entropy(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    label_smoothing: float, local_gradient: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of `Loss`; saved_logits and inv_norm as in `Saved`."""
    classes = memory.shape[1]
    inputs = Inputs(features, weight, local_features, memory, labels, bias, 0, classes)
    statistics, *saved = revised_statistics(inputs)
    return *loss_of_statistics(statistics, labels, classes, label_smoothing), *saved


def revised_cross_entropy_backward(
    inputs: Inputs, grad: Tensor, saved: Saved, label_smoothing: float, local_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features (B, C), weight (N, C), local features (B, n, C') and bias (N,).

    Those of the local features are empty without local_gradient, those of the bias without one.
    """
    lse, saved_logits, inv_norm = saved
    features, weight, local_features, labels = inputs.features, inputs.weight, inputs.local_features, inputs.labels
    (_, stripes, _), memory_dtype, dtype = inputs.sizes, inputs.memory.dtype, inv_norm.dtype
    grad = where_valid(grad, labels, inputs.all_classes, 0).to(dtype)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0) if inputs.bias is None else torch.empty_like(inputs.bias)
    grad_features = features.new_zeros(features.shape, dtype=dtype)
    grad_local = local_features.new_zeros(local_features.shape if local_gradient else 0, dtype=dtype)
    features_cast = features.to(memory_dtype).to(dtype)
    is_kept = saved_logits.shape[1] > 0
    for rows, part, scores in chunks(inputs, inv_norm, saved_logits, is_filled=is_kept):
        sigmoids = sigmoids_of(scores[1:], is_kept)
        weights = weights_of(sigmoids)
        revised = weights * scores[0]
        grad_revised = (revised - lse).exp_()
        if label_smoothing:
            grad_revised -= label_smoothing / inputs.all_classes
        place, is_label = places_of_labels(part)
        grad_revised.scatter_add_(0, place, is_label.to(dtype).mul_(label_smoothing - 1))
        grad_revised *= grad
        grad_logits = weights.mul_(grad_revised)
        if grad_weight.dtype == dtype:
            torch.mm(grad_logits, features_cast, out=grad_weight[rows])
        else:
            grad_weight[rows] = grad_logits @ features_cast
        grad_features.addmm_(grad_logits.T, part.weight.to(memory_dtype).to(dtype))
        if inputs.bias is not None:
            grad_bias[rows] = grad_logits.sum(dim=1)
        if local_gradient:
            common = grad_revised.mul_(revised).div_(stripes)
            grad_scores = torch.addcmul(common, common, sigmoids, value=-1, out=sigmoids)
            for total, grad_score, row in zip(grad_local.unbind(1), grad_scores, part.memory, strict=True):
                total.addmm_(grad_score.T, row.to(dtype))
    if local_gradient:
        normalize_backward_(grad_local, local_features.to(dtype), inv_norm)
    return grad_features.to(features.dtype), grad_weight, grad_local.to(local_features.dtype), grad_bias


def normalize_backward_(grad_local: Tensor, local_features: Tensor, inv_norm: Tensor) -> None:
    """From the gradient of f / ||f|| to that of f, in place: (g - u <u, g>) / ||f||, u = f / ||f||."""
    inv_norm = inv_norm.T.unsqueeze(2)
    # Below the bound the length is a constant: nothing to project out.
    along = (grad_local * local_features).sum(dim=2, keepdim=True).mul_(inv_norm.square())
    along.masked_fill_(inv_norm * NORM_EPS > 0.999999, 0)
    grad_local.addcmul_(local_features, along, value=-1).mul_(inv_norm)

"""revised_cross_entropy on ATen, one chunk of classes after the other.

Matrices of scores have classes as rows and samples as columns: a chunk of classes is then contiguous, and the products
with classifier and memory, whose rows are long, are taken the fast way around.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cge_kernels.common.checks import accumulation_dtype
from cge_kernels.common.tiles import chunk_of_logits, logits_are_kept, score_row
from cge_kernels.revise_logits.cpu import NORM_EPS

CHUNK = 2048  # classes whose scores of a usual batch stay in the cache while they are gone over


def chunks(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, bias: Tensor | None, scale: Tensor,
    kept: Tensor, is_filled: bool,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Classes, and their logits and scores (n+1, classes, B), which are in `kept` if it is filled, else computed.

    They are computed into `kept` if that has rows, else into scratch that the next chunk takes again.
    """
    stripes, classes, _ = memory.shape
    batch, dtype = len(features), scale.dtype
    chunk = min(CHUNK, chunk_of_logits(batch, stripes, classes))
    scratch = None if kept.shape[1] else scale.new_empty(stripes + 1, min(chunk, classes), batch)
    if not is_filled:
        columns = features.to(memory.dtype).to(dtype).T
        local_columns = (local_features.to(memory.dtype).to(dtype) * scale.T.unsqueeze(2)).permute(1, 2, 0)
    for start in range(0, classes, chunk):
        part = slice(start, min(start + chunk, classes))
        scores = kept[:, part, :batch] if scratch is None else scratch[:, : part.stop - start]
        if not is_filled:
            torch.mm(weight[part].to(memory.dtype).to(dtype), columns, out=scores[0])
            if bias is not None:
                scores[0] += bias[part].to(dtype).unsqueeze(1)
            for i in range(stripes):
                torch.mm(memory[i, part].to(dtype), local_columns[i], out=scores[i + 1])
        yield part, scores


def log_weights(scores: Tensor) -> Tensor:
    """log w (classes, B) of the stripes' scores (n, classes, B): the mean of log sigmoid."""
    total = torch.exp(-scores[0]).log1p_()
    for score in scores[1:]:
        total += torch.exp(-score).log1p_()
    return total.div_(-len(scores))


def revised_statistics(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor, bias: Tensor | None,
    first_class: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """highest and winner (n+1, B), sums (2, B), target (B), kept (n+1, N or 0, at least B), scale (n, B)."""
    stripes, classes, _ = memory.shape
    batch = len(features)
    dtype = accumulation_dtype(features, weight, local_features, memory)
    scale = local_features.to(dtype).norm(dim=2).clamp_(min=NORM_EPS).reciprocal_().T.contiguous()
    rows = classes if logits_are_kept(batch, stripes, classes) else 0
    kept = scale.new_empty(stripes + 1, rows, score_row(batch))
    kept[:, :, batch:] = 0
    highest = scale.new_full((stripes + 1, batch), -torch.inf)
    winner = labels.new_zeros((stripes + 1, batch), dtype=torch.int64)
    sums, target = scale.new_zeros(2, batch), scale.new_zeros(batch)
    revised = None
    for part, scores in chunks(features, weight, local_features, memory, bias, scale, kept, is_filled=False):
        revised = log_weights(scores[1:]).exp_().mul_(scores[0])
        before = highest[0].clone()
        for j, values in enumerate((revised, *scores[1:])):
            most = values.amax(dim=0)
            better = most > highest[j]
            # Going over the chunk again is dear, and after the first ones few samples have found a better class.
            columns = better.nonzero().squeeze(1)
            if len(columns):
                found = values[:, columns] if len(columns) < batch else values
                winner[j, columns] = found.argmax(dim=0) + (first_class + part.start)
            highest[j] = torch.where(better | most.isnan(), most, highest[j])
        row = labels - (first_class + part.start)
        here = ((row >= 0) & (row < len(revised))).nonzero().squeeze(1)
        target[here] = revised[row[here], here]
        sums[1] += revised.sum(dim=0)
        sums[0] *= (before - highest[0]).exp_()
        sums[0] += revised.sub_(highest[0]).exp_().sum(dim=0)
    return highest, winner, sums, target, kept, scale


def loss_of_statistics(
    highest: Tensor, winner: Tensor, sums: Tensor, target: Tensor, labels: Tensor, classes: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss and log_sum (B,), correct (B,) and stripe_correct (B, n) from the statistics over all N classes."""
    log_sum = highest[0] + sums[0].log()
    loss = log_sum - (1 - label_smoothing) * target - label_smoothing * (sums[1] / classes)
    loss = torch.where((labels >= 0) & (labels < classes), loss, torch.nan)
    is_label = winner == labels
    return loss, log_sum, is_label[0].clone(), is_label[1:].T.contiguous()


def revised_cross_entropy_backward(
    grad: Tensor, log_sum: Tensor, features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor,
    labels: Tensor, bias: Tensor | None, kept: Tensor, scale: Tensor, label_smoothing: float, first_class: int,
    all_classes: int, local_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of features (B, C), weight (N, C), local features (B, n, C') and bias (N,).

    Those of the local features are empty without local_gradient, those of the bias without one.
    """
    stripes, dtype = memory.shape[0], scale.dtype
    grad = torch.where((labels >= 0) & (labels < all_classes), grad, 0).to(dtype)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    grad_features = features.new_zeros(features.shape, dtype=dtype)
    grad_local = local_features.new_zeros(local_features.shape if local_gradient else 0, dtype=dtype)
    operand = features.to(memory.dtype).to(dtype)
    is_filled = kept.shape[1] > 0
    for part, scores in chunks(features, weight, local_features, memory, bias, scale, kept, is_filled):
        weights = log_weights(scores[1:]).exp_()
        revised = weights * scores[0]
        grad_revised = (revised - log_sum).exp_()
        if label_smoothing:
            grad_revised -= label_smoothing / all_classes
        row = labels - (first_class + part.start)
        here = ((row >= 0) & (row < len(revised))).nonzero().squeeze(1)
        grad_revised[row[here], here] -= 1 - label_smoothing
        grad_revised *= grad
        grad_logits = weights.mul_(grad_revised)
        if grad_weight.dtype == dtype:
            torch.mm(grad_logits, operand, out=grad_weight[part])
        else:
            grad_weight[part] = grad_logits @ operand
        grad_features.addmm_(grad_logits.T, weight[part].to(memory.dtype).to(dtype))
        if bias is not None:
            grad_bias[part] = grad_logits.sum(dim=1)
        if local_gradient:
            common = grad_revised.mul_(revised).div_(stripes)
            for i in range(stripes):
                grad_scores = torch.exp(scores[i + 1], out=revised).add_(1).reciprocal_().mul_(common)
                grad_local[:, i].addmm_(grad_scores.T, memory[i, part].to(dtype))
    if local_gradient:
        project_(grad_local, local_features.to(dtype), scale)
    return grad_features.to(features.dtype), grad_weight, grad_local.to(local_features.dtype), grad_bias


def project_(grad_local: Tensor, local_features: Tensor, scale: Tensor) -> None:
    """From the gradient of f / ||f|| to that of f, in place: (g - u <u, g>) / ||f||, u = f / ||f||."""
    scale = scale.T.unsqueeze(2)
    # Below the bound the length is a constant: nothing to project out.
    along = (grad_local * local_features).sum(dim=2, keepdim=True).mul_(scale.square())
    along.masked_fill_(scale * NORM_EPS > 0.999999, 0)
    grad_local.addcmul_(local_features, along, value=-1).mul_(scale)

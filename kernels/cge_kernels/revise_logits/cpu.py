"""revise_logits on ATen; classes in chunks that fit the scratch budget where the scores are not kept."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cge_kernels.common.checks import accumulation_dtype
from cge_kernels.common.tiles import chunk_of_classes, score_row, scores_are_kept

NORM_EPS = 1e-12  # lower bound of a local feature's length


def chunks_of_scores(
    local_features: Tensor, memory: Tensor, scale: Tensor, buffer: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Classes and their scores (n, B, classes), computed: all at once into the buffer if it has columns.

    scale: (n, B), 1 / max(||f_i||, 1e-12).
    """
    stripes, classes, _ = memory.shape
    batch = len(local_features)
    operand = local_features.to(memory.dtype).to(scale.dtype)
    chunk = classes if buffer.shape[2] else chunk_of_classes(batch, stripes, classes)
    for start in range(0, classes, chunk):
        part = slice(start, min(start + chunk, classes))
        rows = memory[:, part]
        scores = buffer[:, :, part] if buffer.shape[2] else scale.new_empty(stripes, batch, rows.shape[1])
        for i in range(stripes):
            # The long rows of the memory go first: its transpose would be the slower matmul.
            torch.mul((rows[i].to(scale.dtype) @ operand[:, i].T).T, scale[i].unsqueeze(1), out=scores[i])
        yield part, scores


def weights_of(scores: Tensor) -> Tensor:
    """w (B, classes), the geometric mean of the stripes' sigmoids."""
    return logsigmoid(scores).mean(dim=0).exp_()


def revise_logits(logits: Tensor, local_features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Revised logits (B, N), scores (n, B, score_row) or (n, B, 0) if they are not kept, scale (n, B)."""
    stripes, classes, _ = memory.shape
    dtype = accumulation_dtype(local_features, memory)
    scale = local_features.to(dtype).norm(dim=2).clamp_(min=NORM_EPS).reciprocal_().T.contiguous()
    row = score_row(classes) if scores_are_kept(local_features, memory) else 0
    kept = logits.new_empty(stripes, len(logits), row, dtype=dtype)
    kept[:, :, classes:] = 0
    revised = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part, scores in chunks_of_scores(local_features, memory, scale, kept):
        revised[:, part] = weights_of(scores).mul_(logits[:, part])
    return revised, kept, scale


def revise_logits_backward(
    grad: Tensor,
    logits: Tensor,
    local_features: Tensor,
    memory: Tensor,
    scores: Tensor,
    scale: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits (B, N) and of the local features (B, n, C), the latter empty without local_gradient."""
    stripes, classes, _ = memory.shape
    dtype = scale.dtype
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad_local = local_features.new_zeros(local_features.shape if local_gradient else 0, dtype=dtype)
    projection = torch.zeros_like(scale)
    if scores.shape[2]:
        parts = [(slice(classes), scores[:, :, :classes])]
    else:
        parts = chunks_of_scores(local_features, memory, scale, scores)
    for part, score in parts:
        grad_part = weights_of(score).mul_(grad[:, part])
        grad_logits[:, part] = grad_part
        if local_gradient:
            grad_scores = score.neg().sigmoid_().mul_(grad_part.mul_(logits[:, part]).div_(stripes))
            projection += (grad_scores * score).sum(dim=2)
            for i in range(stripes):
                grad_local[:, i].addmm_(grad_scores[i], memory[i, part].to(dtype))
    if not local_gradient:
        return grad_logits, local_features.new_empty(0)
    # Below the bound the length is a constant: nothing to project out.
    projection.mul_(scale).masked_fill_(scale * NORM_EPS > 0.999999, 0)
    grad_local.addcmul_(local_features.to(dtype), projection.T.unsqueeze(2), value=-1).mul_(scale.T.unsqueeze(2))
    return grad_logits, grad_local.to(local_features.dtype)

"""revise_logits for the CPU; classes in chunks that fit the scratch budget where the scores are not kept."""

from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from torch import Tensor

from cge_kernels.common.budget import chunk_of_classes, empty_scores
from cge_kernels.common.checks import accumulation_dtype

NORM_EPS = 1e-12  # lower bound of a local feature's length
FACTORS = 64  # of which a float32 holds the product: the sigmoid of a cosine is at least 0.26


def inverse_norms(local_features: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, B): 1 / max(||f_i||, 1e-12)."""
    return local_features.to(dtype).norm(dim=2).clamp_(min=NORM_EPS).reciprocal_().T.contiguous()


def chunks_of_scores(
    local_features: Tensor, memory: Tensor, inv_norm: Tensor, buffer: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Classes and their scores (n, B, classes), computed: all at once into the buffer if it has columns.

    inv_norm: (n, B), 1 / max(||f_i||, 1e-12).
    """
    stripes, classes, _ = memory.shape
    batch = len(local_features)
    local = local_features.to(memory.dtype).to(inv_norm.dtype)
    chunk = classes if buffer.shape[2] else chunk_of_classes(batch, stripes, classes)
    for start in range(0, classes, chunk):
        part = slice(start, min(start + chunk, classes))
        rows = memory[:, part]
        scores = buffer[:, :, part] if buffer.shape[2] else inv_norm.new_empty(stripes, batch, rows.shape[1])
        for i in range(stripes):
            # The long rows of the memory go first: its transpose would be the slower matmul.
            torch.mul((rows[i].to(inv_norm.dtype) @ local[:, i].T).T, inv_norm[i].unsqueeze(1), out=scores[i])
        yield part, scores


def weights_of(sigmoids: Tensor) -> Tensor:
    """w, the geometric mean over the first dimension."""
    logs = [group.prod(dim=0).log2_() for group in sigmoids.split(FACTORS)]
    return reduce(Tensor.add_, logs).div_(len(sigmoids)).exp2_()  # much faster than exp


def revise_logits(
    logits: Tensor, local_features: Tensor, memory: Tensor, local_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Revised logits (B, N), scores (n, B, score_row) or (n, B, 0) if they are not kept, inv_norm (n, B)."""
    inv_norm = inverse_norms(local_features, accumulation_dtype(local_features, memory))
    scores, _ = empty_scores(len(logits), memory, inv_norm.dtype)
    scores[:, :, memory.shape[1] :] = 0
    revised = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part, chunk in chunks_of_scores(local_features, memory, inv_norm, scores):
        revised[:, part] = weights_of(torch.sigmoid(chunk)).mul_(logits[:, part])
    return revised, scores, inv_norm


def revise_logits_backward(
    grad: Tensor, logits: Tensor, local_features: Tensor, memory: Tensor, scores: Tensor, inv_norm: Tensor,
    local_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the logits (B, N) and of the local features (B, n, C), the latter empty without local_gradient."""
    stripes, classes, _ = memory.shape
    dtype = inv_norm.dtype
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad_local = local_features.new_zeros(local_features.shape if local_gradient else 0, dtype=dtype)
    projection = torch.zeros_like(inv_norm)
    parts: Iterable[tuple[slice, Tensor]] = [(slice(classes), scores[:, :, :classes])]
    if not scores.shape[2]:
        parts = chunks_of_scores(local_features, memory, inv_norm, scores)
    for part, score in parts:
        sigmoids = torch.sigmoid(score)
        grad_part = weights_of(sigmoids).mul_(grad[:, part])
        grad_logits[:, part] = grad_part
        if local_gradient:
            common = grad_part.mul_(logits[:, part]).div_(stripes)
            grad_scores = torch.addcmul(common, common, sigmoids, value=-1, out=sigmoids)
            projection += (grad_scores * score).sum(dim=2)
            for i in range(stripes):
                grad_local[:, i].addmm_(grad_scores[i], memory[i, part].to(dtype))
    if not local_gradient:
        return grad_logits, local_features.new_empty(0)
    # Below the bound the length is a constant: nothing to project out.
    projection.mul_(inv_norm).masked_fill_(inv_norm * NORM_EPS > 0.999999, 0)
    grad_local.addcmul_(local_features.to(dtype), projection.T.unsqueeze(2), value=-1).mul_(inv_norm.T.unsqueeze(2))
    return grad_logits, grad_local.to(local_features.dtype)

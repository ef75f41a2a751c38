"""revise_logits on ATen."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cge_kernels.checks import accumulation_dtype
from cge_kernels.configurations import score_row, scores_are_kept

NORM_EPS = 1e-12  # lower bound of a local feature's length


def revise_logits(logits: Tensor, local_features: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Revised logits (B, N), scores (n, B, score_row) or (n, B, 0) if they are not kept, scale (n, B)."""
    stripes, classes, _ = memory.shape
    dtype = accumulation_dtype(local_features, memory)
    local = local_features.to(dtype)
    scale = 1 / local.norm(dim=2).clamp(min=NORM_EPS).T.contiguous()
    products = torch.einsum("bic,ikc->ibk", local_features.to(memory.dtype).to(dtype), memory.to(dtype))
    row = score_row(classes) if scores_are_kept(local_features, memory) else 0
    scores = products * scale.unsqueeze(2)
    weights = logsigmoid(scores).mean(dim=0).exp()
    revised = (logits.to(dtype) * weights).to(logits.dtype)
    kept = logits.new_zeros(stripes, len(logits), row, dtype=dtype)
    if row:
        kept[:, :, :classes] = scores
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
    scale = scale.unsqueeze(2)
    local = local_features.to(dtype)
    if scores.shape[2]:
        scores = scores[:, :, :classes]
    else:
        scores = torch.einsum("bic,ikc->ibk", local_features.to(memory.dtype).to(dtype), memory.to(dtype)) * scale
    weights = logsigmoid(scores).mean(dim=0).exp()
    grad_logits = grad.to(dtype) * weights
    if not local_gradient:
        return grad_logits.to(logits.dtype), local_features.new_empty(0)
    grad_scores = grad_logits * logits.to(dtype) * (-scores).sigmoid() / stripes
    projection = torch.where(scale * NORM_EPS < 0.999999, (grad_scores * scores).sum(dim=2, keepdim=True) * scale, 0)
    grad_local = torch.einsum("ibk,ikc->ibc", grad_scores, memory.to(dtype))
    grad_local = (grad_local - local.transpose(0, 1) * projection) * scale
    return grad_logits.to(logits.dtype), grad_local.transpose(0, 1).to(local_features.dtype).contiguous()

"""Local classification by cosine to a class memory (NLC) and revision of the global logits (GLR)."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cge_reference.common import accumulation_dtype, without_autocast

NORM_EPS = 1e-12  # lower bound of a local feature's norm


@without_autocast
def local_scores(local_features: Tensor, memory: Tensor) -> Tensor:
    """s_i[k] = <f_i, M[i,k]> / max(||f_i||, 1e-12), the scores (B, n, N) of the paper's module NLC.

    Both factors are cast to the memory's dtype; the norm and the sums are float32 (float64 if an argument is). The rows
    of the memory (n, N, C) are unit vectors, or zero for a class never seen, whose score is 0. No gradient reaches it.
    """
    dtype = accumulation_dtype(local_features, memory)
    norm = local_features.to(dtype).norm(dim=2).clamp(min=NORM_EPS)
    products = torch.einsum("bic,ikc->bik", local_features.to(memory.dtype).to(dtype), memory.detach().to(dtype))
    return products / norm.unsqueeze(2)


def revise(logits: Tensor, scores: Tensor, local_gradient: bool) -> Tensor:
    """p * w with w = (prod_i sigmoid(s_i))^(1/n), in the dtype of the scores: logits (B, N), scores (B, n, N)."""
    weights = logsigmoid(scores).mean(dim=1).exp()
    return logits.to(weights.dtype) * (weights if local_gradient else weights.detach())


@without_autocast
def revise_logits(logits: Tensor, local_features: Tensor, memory: Tensor, local_gradient: bool = True) -> Tensor:
    """Multiplies the logits (B, N) by what the local classifiers think of each class (the paper's module GLR).

    local_gradient: whether the gradient flows through w to the local features. Returns (B, N) in the logits' dtype.
    """
    return revise(logits, local_scores(local_features, memory), local_gradient).to(logits.dtype)

"""Local classification by cosine to a class memory (NLC) and revision of the global logits (GLR)."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cge_reference.checks import (
    accumulation_dtype,
    require_same_device,
    require_shape,
    require_tensor,
    without_autocast,
)

NORM_EPS = 1e-12  # lower bound of a local feature's norm


@without_autocast
def local_scores(local_features: Tensor, memory: Tensor) -> Tensor:
    """s_i[k] = <f_i, M[i,k]> / max(||f_i||, 1e-12), the score vectors of the paper's module NLC.

    The operands of the product are cast to the memory's dtype, the norm and the sums are float32 (float64 if an
    argument is). No gradient reaches the memory.

    Args:
        local_features: (B, n, C), floating.
        memory: (n, N, C), floating; each row is zero (class never seen) or a unit vector.

    Returns:
        scores (B, n, N), float32 or float64, in [-1, 1]; 0 for a class never seen.
    """
    require_tensor("local_features", local_features, "(B, n, C)")
    require_tensor("memory", memory, "(n, N, C)")
    require_same_device(local_features=local_features, memory=memory)
    batch, stripes, channels = local_features.shape
    require_shape(
        "memory", memory, (stripes, memory.shape[1], channels), f"local_features {(batch, stripes, channels)}"
    )
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
    """Multiplies the global logits by what the local classifiers think of each class (the paper's module GLR).

    s_i[k] = <f_i, M[i,k]> / max(||f_i||, 1e-12);  w = (prod_i sigmoid(s_i))^(1/n);  revised = logits * w.

    Args:
        logits: (B, N), floating.
        local_features: (B, n, C), floating.
        memory: (n, N, C), floating; only read, and no gradient reaches it.
        local_gradient: whether the gradient flows through w to the local features.

    Returns:
        revised (B, N) in the dtype of the logits.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: ranks, shapes or devices do not fit.
    """
    require_tensor("logits", logits, "(B, N)")
    scores = local_scores(local_features, memory)
    require_same_device(logits=logits, memory=memory)
    batch, _, classes = scores.shape
    require_shape("logits", logits, (batch, classes), f"local_features and memory {tuple(memory.shape)}")
    return revise(logits, scores, local_gradient).to(logits.dtype)

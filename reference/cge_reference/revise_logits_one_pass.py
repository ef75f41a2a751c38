"""Pooling, local classification and revision in one call."""

from torch import Tensor

from cge_reference.revise_logits import revise_logits
from cge_reference.stripe_pool import stripe_pool


def revise_logits_one_pass(
    feature_map: Tensor, logits: Tensor, memory: Tensor, p: float | Tensor | None = None, eps: float = 1e-6,
    local_gradient: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`stripe_pool` with n = memory.shape[0], then `revise_logits`: revised (B, N) and local_features (B, n, C)."""
    _, local_features = stripe_pool(feature_map, memory.shape[0], p, eps)
    return revise_logits(logits, local_features, memory, local_gradient), local_features

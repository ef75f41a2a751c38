"""Pooling, local classification and revision in one call."""

from torch import Tensor

from cge_reference.checks import require_tensor
from cge_reference.revise_logits import revise_logits
from cge_reference.stripe_pool import stripe_pool


def revise_logits_one_pass(
    feature_map: Tensor,
    logits: Tensor,
    memory: Tensor,
    p: float | Tensor | None = None,
    eps: float = 1e-6,
    local_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Revised logits straight from the feature map: `stripe_pool` with n = memory.shape[0], then `revise_logits`.

    Args:
        feature_map: (B, C, H, W), floating.
        logits: (B, N), floating.
        memory: (n, N, C), floating; only read, and no gradient reaches it.
        p, eps: as in `stripe_pool`.
        local_gradient: as in `revise_logits`.

    Returns:
        revised (B, N) in the dtype of the logits, and local_features (B, n, C) as `stripe_pool` returns them.

    Raises:
        TypeError, ValueError: as `stripe_pool` and `revise_logits`.
    """
    require_tensor("memory", memory, "(n, N, C)")
    _, local_features = stripe_pool(feature_map, memory.shape[0], p, eps)
    return revise_logits(logits, local_features, memory, local_gradient), local_features

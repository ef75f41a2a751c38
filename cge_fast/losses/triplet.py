"""Batch-hard triplet loss."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus


def pairwise_distance(features: Tensor) -> Tensor:
    """(B, B) Euclidean distances of features (B, C)."""
    # Differences, not the matmul form: near-equal features lose all digits there, and cdist's gradient at 0 is 0.
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


def batch_hard_triplet(features: Tensor, labels: Tensor, margin: float | Literal["soft"] = 0.0) -> Tensor:
    """Mean over anchors of the hardest triplet in the batch (Hermans et al. 2017), Euclidean, not normalised.

    With d_ap the farthest sample of the anchor's identity (the anchor itself counts, at 0) and d_an the nearest of
    another: max(0, d_ap - d_an + margin), or log(1 + exp(d_ap - d_an)) for margin "soft". An anchor without any
    sample of another identity contributes 0.

    Args:
        features: (B, C), float32 or float64.
        labels: (B,), integer.
        margin: the hinge's margin, or "soft".

    Returns:
        the loss, 0-d.
    """
    distance = pairwise_distance(features)
    same = labels[:, None] == labels[None, :]
    hardest_positive = distance.masked_fill(~same, 0).amax(dim=1)
    hardest_negative = distance.masked_fill(same, torch.inf).amin(dim=1)
    gap = hardest_positive - hardest_negative
    return (softplus(gap) if margin == "soft" else relu(gap + margin)).mean()

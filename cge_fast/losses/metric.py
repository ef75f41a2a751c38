"""Losses of the features within a batch, by name."""

from collections.abc import Callable
from typing import Literal

import torch
from pytorch_metric_learning.losses import CircleLoss, ContrastiveLoss, LiftedStructureLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from cge_fast.losses.triplet import batch_hard_triplet, pairwise_distance

Metric = Literal["triplet", "wrt", "wrt_published", "contrastive", "lifted", "instance", "circle"]

CIRCLE_MARGIN, CIRCLE_GAMMA = 0.25, 2.0  # the CGE paper's
INSTANCE_SCALE = 64.0  # as in pytorch-metric-learning and Zheng's person re-ID baseline
PUBLISHED_WRT_EPS = 1e-6


def metric_loss(features: Tensor, labels: Tensor, kind: Metric, margin: float | Literal["soft"]) -> Tensor:
    """The loss called `kind`, 0-d, of features (B, C), floating, and labels (B,), integer; float32 at least.

    margin: of the triplet loss (`batch_hard_triplet`); the others have none.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    if kind == "triplet":
        return batch_hard_triplet(features, labels, margin)
    return PAIR_LOSSES[kind](features, labels)


def weighted_regularised_triplet(features: Tensor, labels: Tensor, published: bool = False) -> Tensor:
    """AGW's WRT: mean of log(1 + exp(sum_p w_p d_p - sum_n w_n d_n)), d Euclidean; the weights carry gradient.

    w_p = softmax(d) over the anchor's positives (itself among them), w_n = softmax(-d) over its negatives. An anchor
    without negatives contributes log(1 + exp(sum_p w_p d_p)).

    Args:
        features: (B, C), floating.
        labels: (B,), integer.
        published: reproduce the public code's defect: the exponentials of negatives are not shifted and 1e-6 is added
            to their sum, so that weights of far negatives (distances above about 15) vanish.

    Returns:
        the loss, 0-d.
    """
    distance = pairwise_distance(features)
    same = labels[:, None] == labels[None, :]
    positive = distance.masked_fill(~same, -torch.inf).softmax(dim=1)
    if published:
        exponential = (-distance).exp().masked_fill(same, 0)
        negative = exponential / (exponential.sum(dim=1, keepdim=True) + PUBLISHED_WRT_EPS)
    else:
        # Finite, so that the softmax of a row without negatives is no NaN; it is masked afterwards.
        negative = (-distance).masked_fill(same, torch.finfo(distance.dtype).min).softmax(dim=1).masked_fill(same, 0)
    return softplus((positive * distance).sum(dim=1) - (negative * distance).sum(dim=1)).mean()


def instance_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of 64 * cosine to the batch's identities, each represented by its samples' mean direction.

    After Zheng et al. 2017 (instance loss: every identity of the batch a class of its own). The loss of that name in
    pytorch-metric-learning takes an identity's number for the index of a sample, which is right only where each
    identity has one image.

    Args:
        features: (B, C), floating.
        labels: (B,), integer.

    Returns:
        the loss, 0-d.
    """
    _, number = labels.unique(return_inverse=True)
    directions = normalize(features)
    members = torch.nn.functional.one_hot(number).T.to(features.dtype)
    return cross_entropy(INSTANCE_SCALE * directions @ normalize(members @ directions).T, number)


PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wrt": weighted_regularised_triplet,
    "wrt_published": lambda features, labels: weighted_regularised_triplet(features, labels, published=True),
    "contrastive": ContrastiveLoss(),  # positive margin 0, negative margin 1, of normalised features
    "lifted": LiftedStructureLoss(),  # the same margins
    "instance": instance_loss,
    "circle": CircleLoss(m=CIRCLE_MARGIN, gamma=CIRCLE_GAMMA),
}

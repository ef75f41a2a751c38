"""Losses of features, by name: of those within a batch, and SphereFace's and the center loss of classes too."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu, softplus

from cge_fast.options import Metric

CIRCLE_MARGIN, CIRCLE_GAMMA = 0.25, 2.0  # the CGE paper's
SPHERE_MARGIN = 4  # m: SphereFace's and the CGE paper's
INSTANCE_SCALE = 64.0  # as in pytorch-metric-learning and Zheng's person re-ID baseline
PUBLISHED_WRT_EPS = 1e-6


class MetricLoss(nn.Module):
    """The loss called `kind`, 0-d, of features (B, C), floating, and labels (B,), integer; float32 at least.

    Args:
        kind: which loss.
        margin: of the triplet loss (`batch_hard_triplet`); the others have none.
        num_classes: N, for "sphere", which has a weight for each class and channel.
        channels: C, for "sphere".
    """

    def __init__(
        self,
        kind: Metric = "triplet",
        margin: float | Literal["soft"] = 0.3,
        num_classes: int | None = None,
        channels: int | None = None,
    ):
        super().__init__()
        self.loss = loss_called(kind, margin, num_classes, channels)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d."""
        if features.dtype in (torch.float16, torch.bfloat16):
            features = features.float()
        return self.loss(features, labels)


def loss_called(
    kind: Metric, margin: float | Literal["soft"], num_classes: int | None, channels: int | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function or module that computes the loss."""
    match kind:
        case "triplet":
            return partial(batch_hard_triplet, margin=margin)
        case "wrt" | "wrt_published":
            return partial(weighted_regularised_triplet, published=kind == "wrt_published")
        case "instance":
            return instance_loss
    from pytorch_metric_learning import losses  # takes a second

    match kind:
        case "contrastive":
            return losses.ContrastiveLoss()  # positive margin 0, negative margin 1, of normalised features
        case "lifted":
            return losses.LiftedStructureLoss()  # the same margins
        case "circle":
            return losses.CircleLoss(m=CIRCLE_MARGIN, gamma=CIRCLE_GAMMA)
        case "sphere":
            if not num_classes or not channels:
                raise ValueError(f"sphere needs num_classes and channels, got {num_classes} and {channels}")
            return losses.SphereFaceLoss(num_classes, channels, margin=SPHERE_MARGIN)


class CenterLoss(nn.Module):
    """mean_b |x_b - c_{y_b}|^2 (Wen et al. 2016), as AGW's published settings have it.

    After each step the centers take a step of SGD with a rate of their own, so they are no parameters.

    Args:
        num_classes: N.
        channels: C of the features.
        rate: learning rate of the centers (AGW: 0.5).
    """

    centers: Tensor  # (N, C)

    def __init__(self, num_classes: int, channels: int, rate: float = 0.5):
        super().__init__()
        self.register_buffer("centers", torch.randn(num_classes, channels))
        self.rate = rate

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """0-d, of features (B, C) and labels (B,); no gradient reaches the centers."""
        return (features.float() - self.centers[labels]).square().sum(dim=1).mean()

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor) -> None:
        """One step of SGD on the centers, of features (B, C) of the batch that the loss was computed on."""
        gradient = (self.centers[labels] - features.float()) * (2 / len(labels))
        self.centers.index_add_(0, labels.long(), gradient, alpha=-self.rate)


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
    directions = normalize(features)
    same = labels[:, None] == labels[None, :]
    place = torch.arange(len(labels), device=labels.device)
    first = torch.where(same, place, len(labels)).amin(dim=1)  # the sample that stands for an identity
    cosines = directions @ normalize(same.to(features.dtype) @ directions).T
    return cross_entropy((INSTANCE_SCALE * cosines).masked_fill(first != place, -torch.inf), first)

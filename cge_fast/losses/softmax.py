"""Losses of the logits: smoothed cross entropy, focal loss, and the logits of SphereFace."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, log_softmax, normalize

Classification = Literal["cross_entropy", "focal", "sphere"]

FOCAL_ALPHA, FOCAL_GAMMA = 0.5, 1.0  # the CGE paper's
SPHERE_MARGIN = 4  # m: SphereFace's and the CGE paper's


def classification_losses(logits: Tensor, labels: Tensor, kind: Classification, label_smoothing: float) -> Tensor:
    """Per-sample loss (B,) of logits (B, N); "sphere" is the cross entropy of logits with a margin (`sphere_logits`).

    Args:
        logits: (B, N), floating, revised or not.
        labels: (B,), int64, in [0, N).
        kind: which loss; the focal loss knows no label smoothing.
        label_smoothing: e of the target (1-e) * onehot + e/N.
    """
    if kind == "focal":
        return focal_losses(logits, labels)
    return cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def focal_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-alpha * (1 - q)^gamma * log q, q the softmax probability of the label (Lin et al. 2017), alpha 0.5 and gamma 1.

    Args:
        logits: (B, N), floating.
        labels: (B,), int64.

    Returns:
        (B,).
    """
    log_q = log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    return -FOCAL_ALPHA * (1 - log_q.exp()) ** FOCAL_GAMMA * log_q


def sphere_logits(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits of SphereFace (Liu et al. 2017): |x| cos(theta_k), and |x| psi(theta_k) for the label.

    theta_k is the angle between the feature x and class k's row; psi(theta) = (-1)^j cos(m theta) - 2j with
    j = floor(m theta / pi), m = 4. pytorch-metric-learning has the loss of these logits, but revision needs the logits.

    Args:
        features: (B, C), floating.
        weight: (N, C), floating; its rows are normalised here.
        labels: (B,), int64.

    Returns:
        (B, N).
    """
    cosine = linear(normalize(features), normalize(weight))
    own = cosine.gather(1, labels[:, None])
    with torch.no_grad():
        turns = (SPHERE_MARGIN * own.clamp(-1, 1).acos() / math.pi).floor()
    multiple_angle = 8 * own**4 - 8 * own**2 + 1  # cos(4 theta)
    psi = torch.where(turns % 2 == 0, multiple_angle, -multiple_angle) - 2 * turns
    return features.norm(dim=1, keepdim=True) * cosine.scatter(1, labels[:, None], psi)

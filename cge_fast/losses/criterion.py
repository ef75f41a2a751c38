"""The training loss as one module: the weighted sum of classification, metric and center loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cge_fast.distributed import gather_with_gradient
from cge_fast.losses.metric import CenterLoss
from cge_fast.model import Embeddings

PARTS = ("classification", "metric", "center")


class CriterionOutput(NamedTuple):
    """What the criterion gives of a batch; B batch, n stripes."""

    loss: Tensor  # 0-d: weights @ parts
    parts: Tensor  # (3,), detached: classification, metric and center loss
    correct: Tensor  # (B,) bool, see LossOutput
    stripe_correct: Tensor | None  # (B, n) bool or None, see LossOutput


class ReidCriterion(nn.Module):
    """The weighted sum of three losses; metric and center loss are those of all ranks' samples.

    Args:
        classification: from embeddings and labels to a LossOutput, like CGELoss and SoftmaxLoss. One with a memory has
            `write_memory` and `label_and_mean_weight`, as CGELoss.
        metric: from features (B, C) and labels (B,) to a 0-d loss.
        center: the center loss, or None.
        weights: of the three.
    """

    classification: Any  # has methods that nn.Module has not
    weights: Tensor  # (3,)
    no_center: Tensor  # 0-d: 0

    def __init__(
        self, classification: nn.Module, metric: nn.Module, center: CenterLoss | None, weights: Sequence[float]
    ):
        super().__init__()
        self.classification, self.metric, self.center = classification, metric, center
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.register_buffer("no_center", torch.zeros(()), persistent=False)

    @property
    def has_memory(self) -> bool:
        """Whether the classification loss keeps a memory of local features."""
        return hasattr(self.classification, "write_memory")

    def forward(self, embeddings: Embeddings, labels: Tensor) -> CriterionOutput:
        """The losses of labels (B,), integer, in [0, N)."""
        out = self.classification(embeddings, labels)
        pooled, all_labels = gather_with_gradient(embeddings.pooled), gather_with_gradient(labels)
        metric = self.metric(pooled, all_labels)
        center = self.center(pooled, all_labels) if self.center else self.no_center
        parts = torch.stack([out.loss, metric, center])
        return CriterionOutput(parts @ self.weights, parts.detach(), out.correct, out.stripe_correct)

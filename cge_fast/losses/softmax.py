"""The baseline's loss: label-smoothed cross entropy of a linear classifier, as in BagTricks."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from cge_fast.model import Embeddings
from cge_kernels import ClassShard
from cge_kernels.common.checks import require_shape, require_tensor, valid_labels

CLASSIFIER_STD = 0.001  # BagTricks' initialisation
DRAWN_ROWS = 1024  # so that each draw is a multiple of 16 numbers, as torch draws them


class LossOutput(NamedTuple):
    """What a classification loss gives of a batch; B batch, n stripes."""

    loss: Tensor  # 0-d: the mean over the batch
    correct: Tensor  # (B,) bool: the arg max of the logits, revised if there is CGE, is the label
    stripe_correct: Tensor | None = None  # (B, n) bool: stripe i's arg max is the label; None without a memory


class SoftmaxLoss(nn.Module):
    """Cross entropy of a linear classifier without a bias; the arguments are CGELoss's, which adds a memory to it."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        label_smoothing: float = 0.1,
        classifier_std: float = CLASSIFIER_STD,
    ):
        super().__init__()
        require_sizes(label_smoothing, in_channels=in_channels, num_classes=num_classes)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.weight = nn.Parameter(draw_classifier(num_classes, in_channels, classifier_std))

    def forward(self, embeddings: Embeddings, labels: Tensor) -> LossOutput:
        """The loss of labels (B,), integer, in [0, N)."""
        logits = linear_float32(embeddings.embedding, self.weight)
        return logits_loss(logits, labels, self.label_smoothing)


def linear_float32(embedding: Tensor, weight: Tensor) -> Tensor:
    """Logits (B, N) of embeddings (B, C) and a classifier's weight (N, C), never in autocast."""
    with torch.autocast(embedding.device.type, enabled=False):
        return linear(embedding, weight)


def logits_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> LossOutput:
    """The label-smoothed cross entropy of logits (B, N) and labels (B,), integer, in [0, N)."""
    valid, targets = valid_targets(labels, *logits.shape)
    losses = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return LossOutput(torch.where(valid, losses, torch.nan).mean(), logits.argmax(dim=1) == labels)


def valid_targets(labels: Tensor, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    """Mask (B,) of the labels in [0, N), and int64 labels with 0 for the others.

    As in `revised_cross_entropy` a label outside is a ValueError on the CPU, and masked on a GPU.
    """
    require_tensor("labels", labels, "(B,)", "an integer")
    require_shape("labels", labels, (batch,), f"a batch of {batch}")
    valid = valid_labels(labels, classes)  # if nobody took the mask, torch.compile would drop the check
    return valid, torch.where(valid, labels, 0).long()


def require_sizes(label_smoothing: float, **sizes: int) -> None:
    """Raises ValueError unless each size is at least 1 and label_smoothing lies in [0, 1]."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")


@torch.no_grad()
def draw_classifier(num_classes: int, channels: int, std: float, shard: ClassShard | None = None) -> Tensor:
    """The weight (N, C) float32 with the numbers that nn.Linear and then nn.init.normal_ would draw.

    With a shard only its rows (count, C): those of the whole. The others are drawn and forgotten, piece by piece, so
    that every rank goes on with the same random numbers and none holds all rows.
    """
    shard = shard or ClassShard(0, num_classes, num_classes)
    weight = torch.empty(shard.count, channels)
    # The last piece has what remains: of fewer than 16 numbers torch draws each by itself.
    edges = [*range(0, max(1, num_classes // DRAWN_ROWS) * DRAWN_ROWS, DRAWN_ROWS), num_classes]
    buffer = weight.new_empty(edges[-1] - edges[-2], channels)
    for start, end in itertools.pairwise(edges):
        buffer[: end - start].uniform_()  # what nn.Linear draws first
    for start, end in itertools.pairwise(edges):
        rows = buffer[: end - start].normal_(std=std)
        first, end = max(start, shard.first), min(end, shard.rows.stop)
        if first < end:
            weight[first - shard.first : end - shard.first] = rows[first - start : end - start]
    return weight

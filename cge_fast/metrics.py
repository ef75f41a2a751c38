"""What an epoch adds up on the device; the host looks at it when the epoch ends."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cge_fast.distributed import sum_over_ranks
from cge_fast.losses.criterion import PARTS, CriterionOutput


class EpochMetrics:
    """Losses, accuracies and revision weights of an epoch.

    Args:
        weights: of the classification, metric and center loss.
        stripes: n of the memory; 0 without one, and its metrics are None.
        device: where the sums lie.
    """

    def __init__(self, weights: Sequence[float], stripes: int, device: torch.device):
        self.weights, self.stripes = weights, stripes
        self.losses = torch.zeros(len(PARTS), device=device)  # times samples
        self.samples = torch.zeros((), device=device)
        self.correct = torch.zeros((), device=device)
        self.stripe_correct = torch.zeros(stripes, device=device)
        self.num_stripes_correct = torch.zeros(stripes + 1, device=device)  # samples of which 0..n stripes are right
        self.label_and_mean_weight = torch.zeros(2, device=device)  # times the samples of the log steps
        self.log_step_samples = torch.zeros((), device=device)
        self.counts = torch.arange(stripes + 1, device=device)

    def update(self, out: CriterionOutput) -> None:
        """Adds a micro-batch, without synchronising with the host."""
        samples = len(out.correct)
        self.losses.add_(out.parts * samples)
        self.samples.add_(samples)
        self.correct.add_(out.correct.sum())
        if self.stripes and out.stripe_correct is not None:
            self.stripe_correct.add_(out.stripe_correct.sum(dim=0))
            self.num_stripes_correct.add_((out.stripe_correct.sum(dim=1, keepdim=True) == self.counts).sum(dim=0))

    def update_weights(self, label_and_mean_weight: Tensor, samples: int) -> None:
        """Adds what `CGELoss.label_and_mean_weight` gives of a log step's samples."""
        self.label_and_mean_weight.add_(label_and_mean_weight)
        self.log_step_samples.add_(samples)

    def all_reduce(self) -> None:
        """Adds up the ranks' metrics."""
        for tensor in (
            *(self.losses, self.samples, self.correct, self.stripe_correct, self.num_stripes_correct),
            *(self.label_and_mean_weight, self.log_step_samples),
        ):
            sum_over_ranks(tensor)

    def row(self) -> dict[str, Any]:
        """The epoch's means, for metrics.jsonl."""
        samples = self.samples.item()
        losses = (self.losses / samples).tolist()
        label_weight, mean_weight = (self.label_and_mean_weight / self.log_step_samples).tolist()
        return {
            "loss": sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True)),
            **dict(zip(PARTS, losses, strict=True)),
            "train_accuracy": self.correct.item() / samples,
            "label_weight": label_weight if self.stripes else None,
            "mean_weight": mean_weight if self.stripes else None,
            "stripe_precision": (self.stripe_correct / samples).tolist() if self.stripes else None,
            "num_stripes_correct": (self.num_stripes_correct / samples).tolist() if self.stripes else None,
        }

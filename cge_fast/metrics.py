"""What an epoch adds up, without a look at the device between two log steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cge_fast.distributed import sum_over_ranks
from cge_fast.losses.criterion import PARTS, CriterionOutput


class EpochMetrics:
    """Losses, accuracies and revision weights of an epoch: kept on the device, until `fold` adds them up on the host.

    Args:
        weights: of the classification, metric and center loss.
        stripes: n of the memory; 0 without one, and its metrics are None.
        device: where ranks add up.
    """

    def __init__(self, weights: Sequence[float], stripes: int, device: torch.device):
        self.weights, self.stripes, self.device = weights, stripes, device
        self.pending: list[CriterionOutput] = []
        self.pending_weights: list[Tensor] = []
        self.losses = torch.zeros(len(PARTS))  # times samples
        self.label_and_mean_weight = torch.zeros(2)  # times the samples of the log steps
        self.counts = torch.zeros(3, dtype=torch.float64)  # samples, those of the log steps, correct ones
        self.stripe_correct = torch.zeros(stripes, dtype=torch.float64)
        self.num_stripes_correct = torch.zeros(stripes + 1, dtype=torch.float64)  # samples with 0..n stripes right

    @property
    def samples(self) -> float:
        """How many have been added up."""
        return self.counts[0].item()

    @property
    def accuracy(self) -> float:
        """The share of samples that are classified correctly."""
        return (self.counts[2] / self.counts[0]).item()

    def update(self, out: CriterionOutput) -> None:
        """Takes up a micro-batch; computes nothing."""
        self.pending.append(out._replace(loss=out.loss.detach()))

    def update_weights(self, label_and_mean_weight: Tensor, samples: int) -> None:
        """Takes up what `CGELoss.label_and_mean_weight` gives of a log step's samples."""
        self.pending_weights.append(label_and_mean_weight)
        self.counts[1] += samples

    def fold(self) -> list[float]:
        """Adds up what has been taken up, waiting for the device; the losses of these micro-batches."""
        if not self.pending:
            return []
        losses, parts, correct, stripe_correct = zip(*self.pending, strict=True)
        for part, flags in zip(torch.stack(parts).cpu(), correct, strict=True):
            self.losses += part * len(flags)
        for weights in self.pending_weights:
            self.label_and_mean_weight += weights.cpu()
        all_correct = torch.cat(correct).cpu()
        self.counts[0] += len(all_correct)
        self.counts[2] += all_correct.sum()
        if self.stripes:
            flags = torch.cat(stripe_correct).cpu()
            self.stripe_correct += flags.sum(dim=0)
            self.num_stripes_correct += flags.sum(dim=1).bincount(minlength=self.stripes + 1)
        self.pending.clear()
        self.pending_weights.clear()
        return torch.stack(losses).tolist()

    def all_reduce(self) -> None:
        """Adds up the ranks' metrics."""
        sums = (self.losses, self.label_and_mean_weight, self.counts, self.stripe_correct, self.num_stripes_correct)
        whole = torch.cat(sums).to(self.device)
        sum_over_ranks(whole)
        for tensor, of_all in zip(sums, whole.cpu().split([len(tensor) for tensor in sums]), strict=True):
            tensor.copy_(of_all)

    def row(self) -> dict[str, Any]:
        """The epoch's means, for metrics.jsonl."""
        samples, log_step_samples, _ = self.counts.tolist()
        losses = (self.losses / samples).tolist()
        label_weight, mean_weight = (self.label_and_mean_weight / log_step_samples).tolist()
        return {
            "loss": sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True)),
            **dict(zip(PARTS, losses, strict=True)),
            "train_accuracy": self.accuracy,
            "label_weight": label_weight if self.stripes else None,
            "mean_weight": mean_weight if self.stripes else None,
            "stripe_precision": (self.stripe_correct.float() / samples).tolist() if self.stripes else None,
            "num_stripes_correct": (self.num_stripes_correct.float() / samples).tolist() if self.stripes else None,
        }

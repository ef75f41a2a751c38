"""How far revision tells the true class from the others: its weights of either (the paper's module GLR)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.trained import Trained, require_cge, require_labels_differ, train_batches
from cge_fast.analyze.written import COLOURS, HATCHES, Written, write

LOWEST, HIGHEST = 0.268, 0.732  # the bins' range: weights lie from sigmoid(-1) = 0.26894 to sigmoid(1) = 0.73106
BINS = 464  # 0.001 wide
CLASSES = ("true", "false")


def weights(checkpoints: Sequence[Trained], output: Path) -> Written:
    """Histograms of w = (prod_i sigmoid(s_i))^(1/n) over the training images, of the true and the false classes.

    weights.png and weights.csv, a panel for each checkpoint. Shares are of the weights of each kind.

    Raises:
        UserError: a checkpoint has no CGE, does not fit the data, or has the label of another.
    """
    require_labels_differ(checkpoints)
    require_cge(checkpoints, "weights")
    rows, moments, summaries = [], [], []
    for trained in checkpoints:
        counts, mean, deviation = histogram(trained)
        moments.append((mean, deviation))
        for classes, of_classes in zip(CLASSES, counts, strict=True):
            rows += [
                {
                    "checkpoint": trained.label,
                    "classes": classes,
                    "from": round(LOWEST + number / 1000, 3),
                    "to": round(LOWEST + (number + 1) / 1000, 3),
                    "count": int(count),
                    "share": count / max(1, of_classes.sum().item()),
                }
                for number, count in enumerate(of_classes.tolist())
            ]
        told = [f"{classes} {mean[i]:.4f} ± {deviation[i]:.4f}" for i, classes in enumerate(CLASSES)]
        summaries.append(f"{trained.label}: " + ", ".join(told))
    return write(output, "weights", drawn(rows, checkpoints, moments), rows, "weights w: " + "; ".join(summaries))


def histogram(trained: Trained) -> tuple[Tensor, list[float], list[float]]:
    """Counts (2, bins) int64, means and standard deviations of the weights of true and of false classes."""
    head = trained.network.head
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    sums = torch.zeros(2, 3, dtype=torch.float64)  # of 1, w and w^2
    for images, labels in train_batches(trained):
        _, local_features = head.pool(trained.network.feature_map(images))
        weight = head.revision_weights(local_features)
        true = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, labels[:, None], True)
        for kind, values in enumerate((weight[true], weight[~true])):
            values = values.double()
            place = ((values - LOWEST) / (HIGHEST - LOWEST) * BINS).long().clamp_(0, BINS - 1)
            counts[kind] += place.bincount(minlength=BINS).cpu()
            sums[kind] += torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()]).cpu()
    number, total, squares = sums.unbind(dim=1)
    mean = total / number
    return counts, mean.tolist(), (squares / number - mean.square()).clamp(min=0).sqrt().tolist()


def drawn(rows: Sequence[dict], checkpoints: Sequence[Trained], moments: Sequence[tuple]) -> Figure:
    """A panel for each checkpoint, over the range where weights were found."""
    found = [row for row in rows if row["count"]]
    figure = Figure(figsize=(7.5, 1.2 + 3.4 * len(checkpoints)), layout="constrained")
    figure.suptitle("Revision weights of the training images")
    panels = figure.subplots(len(checkpoints), sharex=True, squeeze=False)[:, 0]
    for axes, trained, (mean, deviation) in zip(panels, checkpoints, moments, strict=True):
        for index, classes in enumerate(CLASSES):
            mine = [row for row in rows if (row["checkpoint"], row["classes"]) == (trained.label, classes)]
            axes.stairs(
                [100 * row["share"] for row in mine],
                [mine[0]["from"], *(row["to"] for row in mine)],
                fill=True,
                alpha=0.65,
                color=COLOURS[index],
                hatch=HATCHES[index],
                label=f"{classes} class{'es' if index else ''}: {mean[index]:.4f} ± {deviation[index]:.4f}",
            )
        axes.set(
            title=trained.title,
            ylabel="share of the weights, %",
            xlim=(min(row["from"] for row in found), max(row["to"] for row in found)),
        )
        axes.legend(title="mean ± standard deviation")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("weight w, in bins of 0.001")
    return figure

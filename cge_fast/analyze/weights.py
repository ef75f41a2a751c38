"""How far revision tells the true class from the others: its weights of either (the paper's module GLR)."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.trained import Trained, require_cge, train_batches
from cge_fast.analyze.written import COLOURS, HATCHES, Row, Written, labelled, told, write
from cge_fast.losses.cge import revision_weights

LOWEST, HIGHEST = 0.268, 0.732  # the bins' range: weights lie from sigmoid(-1) = 0.26894 to sigmoid(1) = 0.73106
BINS = 464  # 0.001 wide
EDGES = [round(LOWEST + number / 1000, 3) for number in range(BINS + 1)]
CLASSES = ("true", "false")


def weights(checkpoints: Sequence[Trained], output: Path | str) -> Written:
    """Histograms of w = (prod_i sigmoid(s_i))^(1/n) over the training images, of the true and the false classes.

    weights.png and weights.csv, a panel for each checkpoint. Shares are of the weights of each kind.
    """
    require_cge(checkpoints, "weights")
    tables, texts = [], []
    for trained in checkpoints:
        counts, mean, deviation = histogram(trained)
        tables.append(
            [
                {"classes": classes, "from": low, "to": high, "count": count, "share": count / max(1, sum(of_classes))}
                for classes, of_classes in zip(CLASSES, counts.tolist(), strict=True)
                for (low, high), count in zip(pairwise(EDGES), of_classes, strict=True)
            ]
        )
        texts.append([f"{mean[kind]:.4f} ± {deviation[kind]:.4f}" for kind in range(len(CLASSES))])
    summary = "weights w: " + told(checkpoints, ("true {}, false {}".format(*text) for text in texts))
    return write(output, "weights", drawn(checkpoints, tables, texts), labelled(checkpoints, tables), summary)


def histogram(trained: Trained) -> tuple[Tensor, list[float], list[float]]:
    """Counts (2, bins) int64, means and standard deviations of the weights of true and of false classes."""
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    sums = torch.zeros(2, 3, dtype=torch.float64)  # of 1, w and w^2
    for images, labels in train_batches(trained):
        memory = getattr(trained.loss, "revising_memory", trained.loss.memory)  # a shuffled one revises otherwise
        weight = revision_weights(trained.model(images).stripes, memory)
        true = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, labels[:, None], True)
        for kind, values in enumerate((weight[true], weight[~true])):
            values = values.double()
            counts[kind] += torch.histc(values, BINS, LOWEST, HIGHEST).long().cpu()
            sums[kind] += torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()]).cpu()
    number, total, squares = sums.unbind(dim=1)
    mean = total / number
    return counts, mean.tolist(), (squares / number - mean.square()).clamp(min=0).sqrt().tolist()


def drawn(checkpoints: Sequence[Trained], tables: Sequence[Sequence[Row]], texts: Sequence[Sequence[str]]) -> Figure:
    """A panel for each checkpoint, over the range where weights were found; `texts` say mean and deviation."""
    filled = [row for rows in tables for row in rows if row["count"]]
    figure = Figure(figsize=(7.5, 1.2 + 3.4 * len(checkpoints)), layout="constrained")
    figure.suptitle("Revision weights of the training images")
    panels = figure.subplots(len(checkpoints), sharex=True, squeeze=False)[:, 0]
    for axes, trained, rows, moments in zip(panels, checkpoints, tables, texts, strict=True):
        for kind, name in enumerate(("true class", "false classes")):
            shares = [100 * row["share"] for row in rows[kind * BINS : (kind + 1) * BINS]]
            look = {"color": COLOURS[kind], "hatch": HATCHES[kind], "label": f"{name}: {moments[kind]}"}
            axes.stairs(shares, EDGES, fill=True, alpha=0.65, **look)
        axes.set(title=trained.label, ylabel="share of the weights, %")
        axes.set_xlim(min(row["from"] for row in filled), max(row["to"] for row in filled))
        axes.legend(title="mean ± standard deviation")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("weight w, in bins of 0.001")
    return figure

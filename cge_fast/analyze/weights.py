"""How far revision tells the true class from the others: its weights of either (the paper's module GLR)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.trained import Trained, require_cge, train_batches
from cge_fast.analyze.written import COLOURS, HATCHES, Written, labelled, told, write
from cge_fast.losses.cge import revision_weights

LOWEST, HIGHEST = 0.268, 0.732  # the bins' range: weights lie from sigmoid(-1) = 0.26894 to sigmoid(1) = 0.73106
BINS = 464  # 0.001 wide
EDGES = [round(LOWEST + number / 1000, 3) for number in range(BINS + 1)]
CLASSES = ("true", "false")


class Histogram(NamedTuple):
    """The weights of the true and, second, of the false classes."""

    counts: Tensor  # (2, bins) int64
    mean: list[float]
    deviation: list[float]  # standard deviation

    @property
    def shares(self) -> Tensor:
        """(2, bins) float64: parts of each row's sum."""
        return self.counts.double() / self.counts.sum(dim=1, keepdim=True).clamp(min=1)

    @property
    def moments(self) -> list[str]:
        """Mean and standard deviation, as text."""
        return [f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in zip(self.mean, self.deviation, strict=True)]


def weights(checkpoints: Sequence[Trained], output: Path) -> Written:
    """Histograms of w = (prod_i sigmoid(s_i))^(1/n) over the training images, of the true and the false classes.

    weights.png and weights.csv, a panel for each checkpoint. Shares are of the weights of each kind.

    Raises:
        UserError: a checkpoint has no CGE, does not fit the data, or has the label of another.
    """
    require_cge(checkpoints, "weights")
    histograms = [histogram(trained) for trained in checkpoints]
    tables = [
        [
            {"classes": classes, "from": EDGES[bin_], "to": EDGES[bin_ + 1], "count": count, "share": share}
            for kind, classes in enumerate(CLASSES)
            for bin_, (count, share) in enumerate(zip(of.counts[kind].tolist(), of.shares[kind].tolist(), strict=True))
        ]
        for of in histograms
    ]
    texts = ["true {}, false {}".format(*of.moments) for of in histograms]
    summary = "weights w: " + told(checkpoints, texts)
    return write(output, "weights", drawn(checkpoints, histograms), labelled(checkpoints, tables), summary)


def histogram(trained: Trained) -> Histogram:
    """The weights of the training images.

    Raises:
        UserError: data and checkpoint do not fit, or an image cannot be read.
    """
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    sums = torch.zeros(2, 3, dtype=torch.float64)  # of 1, w and w^2
    for images, labels in train_batches(trained):
        memory = getattr(trained.loss, "revising_memory", trained.loss.memory)  # a shuffled one revises otherwise
        weight = revision_weights(trained.model(images).stripes, memory)
        true = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, labels[:, None], True)
        for kind, values in enumerate((weight[true], weight[~true])):
            values = values.double()
            place = ((values - LOWEST) / (HIGHEST - LOWEST) * BINS).long().clamp_(0, BINS - 1)
            counts[kind] += place.bincount(minlength=BINS).cpu()
            sums[kind] += torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()]).cpu()
    number, total, squares = sums.unbind(dim=1)
    mean = total / number
    return Histogram(counts, mean.tolist(), (squares / number - mean.square()).clamp(min=0).sqrt().tolist())


def drawn(checkpoints: Sequence[Trained], histograms: Sequence[Histogram]) -> Figure:
    """A panel for each checkpoint, over the range where weights were found."""
    filled = torch.stack([of.counts for of in histograms]).sum(dim=(0, 1)).nonzero().flatten().tolist()
    figure = Figure(figsize=(7.5, 1.2 + 3.4 * len(checkpoints)), layout="constrained")
    figure.suptitle("Revision weights of the training images")
    panels = figure.subplots(len(checkpoints), sharex=True, squeeze=False)[:, 0]
    for axes, trained, of in zip(panels, checkpoints, histograms, strict=True):
        for kind, name in enumerate(("true class", "false classes")):
            axes.stairs(
                100 * of.shares[kind].numpy(),
                EDGES,
                fill=True,
                alpha=0.65,
                color=COLOURS[kind],
                hatch=HATCHES[kind],
                label=f"{name}: {of.moments[kind]}",
            )
        axes.set(title=trained.title, ylabel="share of the weights, %", xlim=(EDGES[filled[0]], EDGES[filled[-1] + 1]))
        axes.legend(title="mean ± standard deviation")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("weight w, in bins of 0.001")
    return figure

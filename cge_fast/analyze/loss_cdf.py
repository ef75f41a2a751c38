"""How the loss is spread over the training images (the paper's Figure 5)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.trained import Trained, require_labels_differ, train_batches
from cge_fast.analyze.written import COLOURS, LINES, Written, write
from cge_fast.errors import UserError
from cge_fast.losses.softmax import classification_losses
from cge_fast.model import ReidModel

STEPS = 500  # of the normalised loss, between 0 and 1


def sample_losses(network: ReidModel, images: Tensor, labels: Tensor) -> Tensor:
    """The classification part (B,) of the loss that the network was trained with, without its weight l1.

    Args:
        network: in the mode to look at it in.
        images: (B, 3, H, W) float32.
        labels: (B,), int64.
    """
    head = network.head
    logits = head.revise(network.feature_map(images), labels)
    return classification_losses(logits, labels, head.classification, head.label_smoothing)


def loss_cdf(checkpoints: Sequence[Trained], output: Path) -> Written:
    """Share of training images up to each loss, as a part of the largest; loss_cdf.png and loss_cdf.csv.

    Each checkpoint's own loss is taken: losses of different kinds compare by their shape alone.

    Raises:
        UserError: a checkpoint does not fit the data, has the label of another, or a loss is not finite.
    """
    require_labels_differ(checkpoints)
    rows, summaries = [], []
    for trained in checkpoints:
        losses = train_losses(trained)
        largest = losses.max()
        normalised = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        share = torch.searchsorted(losses.sort().values, normalised * largest, right=True).double() / len(losses)
        rows += [
            {"checkpoint": trained.label, "normalised_loss": part, "loss": part * largest.item(), "share": up_to}
            for part, up_to in zip(normalised.tolist(), share.tolist(), strict=True)
        ]
        summaries.append(f"{trained.label}: largest {largest:.3f}, median {losses.quantile(0.5) / largest:.1%} of it")
    return write(output, "loss_cdf", drawn(rows, checkpoints), rows, "loss: " + "; ".join(summaries))


def train_losses(trained: Trained) -> Tensor:
    """`sample_losses` of the training images, (images,) float64.

    Raises:
        UserError: data and checkpoint do not fit, or a loss is not finite.
    """
    losses = torch.cat([sample_losses(trained.network, *batch).cpu() for batch in train_batches(trained)]).double()
    if not losses.isfinite().all():
        raise UserError(f"checkpoint {trained.folder}: the loss of a training image is not finite")
    return losses


def drawn(rows: Sequence[dict], checkpoints: Sequence[Trained]) -> Figure:
    """A curve for each checkpoint."""
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for index, trained in enumerate(checkpoints):
        mine = [row for row in rows if row["checkpoint"] == trained.label]
        axes.plot(
            [row["normalised_loss"] for row in mine],
            [100 * row["share"] for row in mine],
            LINES[index % len(LINES)],
            color=COLOURS[index % len(COLOURS)],
            linewidth=2,
            label=f"{trained.title} (largest {mine[-1]['loss']:.2f})",
        )
    axes.set(xlabel="loss / largest loss", ylabel="training images up to this loss, %", xlim=(0, 1), ylim=(0, 101))
    axes.set_title("Distribution of the normalised loss")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    return figure

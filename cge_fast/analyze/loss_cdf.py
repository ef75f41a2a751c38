"""How the loss is spread over the training images (the paper's Figure 5)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from cge_fast.analyze.trained import Trained, require_labels_differ, train_batches
from cge_fast.analyze.written import Row, Written, labelled, styles, told, write
from cge_fast.errors import UserError
from cge_fast.model import Embeddings

STEPS = 500  # of the normalised loss, between 0 and 1


def sample_losses(loss: nn.Module, embeddings: Embeddings, labels: Tensor) -> Tensor:
    """The classification loss of each sample, (B,): that of a batch which is the sample alone."""
    samples = zip(*(part.split(1) for part in (*embeddings, labels)), strict=True)
    return torch.stack([loss(type(embeddings)(*sample), label).loss for *sample, label in samples])


def loss_cdf(checkpoints: Sequence[Trained], output: Path | str) -> Written:
    """Share of training images up to each loss, as a part of the largest; loss_cdf.png and loss_cdf.csv.

    Each checkpoint's own classification loss is taken: losses of different kinds compare by their shape alone.
    """
    require_labels_differ(checkpoints)
    tables, texts = [], []
    for trained in checkpoints:
        losses = train_losses(trained)
        largest = losses.max()
        normalised = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
        share = torch.searchsorted(losses.sort().values, normalised * largest, right=True).double() / len(losses)
        steps = zip(normalised.tolist(), share.tolist(), strict=True)
        tables.append(
            [{"normalised_loss": part, "loss": part * largest.item(), "share": up_to} for part, up_to in steps]
        )
        texts.append(f"largest {largest:.3f}, median {losses.quantile(0.5) / largest:.1%} of it")
    summary = "loss: " + told(checkpoints, texts)
    return write(output, "loss_cdf", drawn(checkpoints, tables), labelled(checkpoints, tables), summary)


def train_losses(trained: Trained) -> Tensor:
    """`sample_losses` of the training images, (images,) float64; UserError if one is not finite."""
    batches = train_batches(trained)
    losses = torch.cat([sample_losses(trained.loss, trained.model(images), labels) for images, labels in batches])
    losses = losses.cpu().double()
    if not losses.isfinite().all():
        raise UserError(f"checkpoint {trained.folder}: the loss of a training image is not finite")
    return losses


def drawn(checkpoints: Sequence[Trained], tables: Sequence[Sequence[Row]]) -> Figure:
    """A curve for each checkpoint."""
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for trained, rows, (colour, line, _) in zip(checkpoints, tables, styles(), strict=False):
        x, y = [row["normalised_loss"] for row in rows], [100 * row["share"] for row in rows]
        label = f"{trained.title} (largest {rows[-1]['loss']:.2f})"
        axes.plot(x, y, line, color=colour, linewidth=2, label=label)
    axes.set(xlabel="loss / largest loss", ylabel="training images up to this loss, %", xlim=(0, 1), ylim=(0, 101))
    axes.set_title("Distribution of the normalised loss")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    return figure

"""How few of the training images make most of the loss (the paper's Figure 5a, after the focal loss's paper)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cge_fast.analyze.trained import Trained, train_batches
from cge_fast.analyze.written import Written, labelled, plot, styles, told, write
from cge_fast.errors import UserError
from cge_fast.model import Embeddings

STEPS = 500  # of the share of images, between 0 and 1


def sample_losses(loss: nn.Module, embeddings: Embeddings, labels: Tensor) -> Tensor:
    """The classification loss of each sample, (B,): that of a batch which is the sample alone."""
    samples = zip(*(part.split(1) for part in (*embeddings, labels)), strict=True)
    return torch.stack([loss(type(embeddings)(*sample), label).loss for *sample, label in samples])


def loss_cdf(checkpoints: Sequence[Trained], output: Path | str) -> Written:
    """Share of the whole loss that the images of least loss make, over their share; loss_cdf.png and loss_cdf.csv.

    Each checkpoint's own classification loss is taken, divided so that it sums to one. The nearer a curve is to the
    lower right corner, the fewer images make most of the loss.
    """
    figure, axes = plot("training images, from the lowest loss to the highest, %", "share of the whole loss, %")
    tables, texts = [], []
    for trained, (colour, line, _) in zip(checkpoints, styles(), strict=False):
        losses = train_losses(trained).sort().values
        count = (torch.linspace(0, 1, STEPS + 1, dtype=torch.float64) * len(losses)).round().long()
        cumulated = torch.cat([losses.new_zeros(1), losses.cumsum(0)])[count]
        shares = cumulated / losses.sum().clamp(min=torch.finfo(losses.dtype).tiny)
        images = count.double() / len(losses)
        points = zip(images.tolist(), shares.tolist(), strict=True)
        tables.append([{"share_of_images": part, "share_of_loss": share} for part, share in points])
        axes.plot(100 * images, 100 * shares, line, color=colour, linewidth=2, label=trained.label)
        texts.append(f"the hardest tenth makes {1 - shares[STEPS * 9 // 10]:.1%} of it")
    axes.set(xlim=(0, 100), ylim=(0, 101), title="Cumulated loss of the training images")
    axes.legend()
    return write(output, "loss_cdf", figure, labelled(checkpoints, tables), "loss: " + told(checkpoints, texts))


def train_losses(trained: Trained) -> Tensor:
    """`sample_losses` of the training images, (images,) float64; UserError if one is not finite."""
    batches = train_batches(trained)
    losses = torch.cat([sample_losses(trained.loss, trained.model(images), labels) for images, labels in batches])
    losses = losses.cpu().double()
    if not losses.isfinite().all():
        raise UserError(f"checkpoint {trained.folder}: the loss of a training image is not finite")
    return losses

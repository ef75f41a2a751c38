"""A checkpoint that was opened to be looked into, and its pass over the training images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cge_fast import data
from cge_fast.api import TrainedModel, load
from cge_fast.build import load_criterion
from cge_fast.data.batches import plain_batches, train_labels
from cge_fast.errors import UserError
from cge_fast.experiments.variants import VARIANTS
from cge_fast.options import DataConfig, EvaluationConfig


@dataclass(frozen=True)
class Trained(TrainedModel):
    """A checkpoint that was opened to be looked into."""

    label: str  # what pictures and tables call it

    @cached_property
    def loss(self) -> nn.Module:
        """The classification loss, with classifier and memory."""
        criterion = load_criterion(self.folder, self.config, self.device, VARIANTS)
        return criterion.classification.eval().requires_grad_(False)


def open_checkpoint(
    folder: Path | str,
    label: str | None = None,
    data: DataConfig | None = None,
    evaluation: EvaluationConfig | None = None,
) -> Trained:
    """Opens a checkpoint, like runs/.../checkpoints/last, on the GPU if there is one.

    Without a label it is called by its run's folder; without settings to look with, it is looked at with its own.

    Raises:
        UserError: the folder is no checkpoint, or does not fit the settings.
    """
    opened = load(folder, None, data, evaluation, VARIANTS)
    return Trained(**vars(opened), label=label or run_name(opened.folder))


def run_name(folder: Path) -> str:
    """The name of the run that a checkpoint belongs to; of a checkpoint that lies elsewhere, its own."""
    whole = folder.absolute()  # not resolved: in runs of 0.1 `last` is a link, whose target's name says less
    return whole.parents[1].name if whole.parent.name == "checkpoints" else whole.name


def require_cge(checkpoints: Sequence[Trained], analysis: str) -> None:
    """Raises UserError if a checkpoint has no memory, which the analysis needs."""
    for trained in checkpoints:
        if not trained.config.model.cge:
            raise UserError(f"checkpoint {trained.folder}: {analysis} needs CGE, this was trained with model.cge false")


def train_batches(trained: Trained) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images (B, 3, H, W) float32, not augmented, and labels (B,) int64, with a progress bar.

    Raises:
        UserError: the data set has other training identities than the loss, or an image cannot be read.
    """
    config = trained.config
    images = data.read(config.data, ["train"]).train
    labels = torch.tensor(train_labels(images))
    classes = trained.loss.num_classes
    if labels.max() + 1 != classes:
        raise UserError(
            f"data: checkpoint {trained.folder} was trained on {classes} identities, {config.data.name} has "
            f"{labels.max() + 1}"
        )
    name = f"training images, {trained.label}"
    batches = plain_batches(images, config.evaluation.batch, config.data, trained.device, name)
    for batch, of_batch in zip(batches, labels.split(config.evaluation.batch), strict=True):
        yield batch, of_batch.to(trained.device)

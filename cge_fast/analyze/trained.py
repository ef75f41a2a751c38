"""A checkpoint that was opened to be looked into, and its pass over the training images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cge_fast import checkpoint, data
from cge_fast.build import load_criterion, load_model
from cge_fast.cli import read_settings
from cge_fast.data.batches import plain_batches, train_labels
from cge_fast.errors import UserError
from cge_fast.experiments.variants import VARIANTS
from cge_fast.model import ReidModel
from cge_fast.options import DataConfig, EvaluationConfig, TrainConfig


@dataclass(frozen=True)
class Trained:
    """A checkpoint's model in evaluation mode, which records no gradients, and its settings."""

    folder: Path
    label: str  # what pictures and tables call it
    model: ReidModel
    config: TrainConfig  # data and evaluation are those to look with, the rest is what it was trained with

    @cached_property
    def loss(self) -> nn.Module:
        """The classification loss, with classifier and memory."""
        criterion = load_criterion(self.folder, self.config, self.device, VARIANTS)
        return criterion.classification.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.neck.weight.device


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
    folder = checkpoint.opened(folder)
    config = read_settings(checkpoint.config_file(folder))
    config = replace(config, data=data or config.data, evaluation=evaluation or config.evaluation)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, config, config.data, device, VARIANTS).eval().requires_grad_(False)
    return Trained(folder, label or run_name(folder), model, config)


def run_name(folder: Path) -> str:
    """The name of the run that a checkpoint belongs to; of a checkpoint that lies elsewhere, its own."""
    whole = folder.absolute()  # not resolved: `last` is a link, whose target's name says less
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

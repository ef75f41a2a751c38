"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder with model.safetensors (what is deployed), loss.safetensors, training.pt and config.yaml. With
model.shard_checkpoints the folder `loss` takes the place of loss.safetensors and of Adam's moments of the classifier.
It is written under another name, fsynced and renamed, so that a folder called epoch_* is always whole. `last` and `best`
are symbolic links, each replaced by one rename; folders that neither points to are removed after that.
"""

import io
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cge_fast import first_edition, sharded_checkpoint
from cge_fast.distributed import barrier, rank
from cge_fast.errors import UserError
from cge_kernels import ClassShard

UNFINISHED = ".unfinished-"  # prefix of what is being written, pointed elsewhere or removed
MODEL, LOSS, TRAINING, CONFIG = "model.safetensors", "loss.safetensors", "training.pt", "config.yaml"
LOSS_FOLDER = "loss"
CLASSIFIER, MEMORY = "classification.weight", "classification.memory"  # names among the criterion's tensors
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, of the classifier
AXES = {CLASSIFIER: 0, MEMORY: 1} | dict.fromkeys(MOMENTS, 0)  # what has a row for each class, and along which axis
STAGED = ".unfinished-loss"  # where the ranks' rows wait for the checkpoint that they belong to


class Contents(NamedTuple):
    """What a checkpoint holds."""

    model: dict[str, Tensor]  # parameters and buffers of ReidModel
    loss: dict[str, Tensor] | None  # and of the criterion; None if `stage_rows` wrote them just before
    training: dict[str, Any]  # what else a training needs to go on: tensors and plain values only


def save(folder: Path, contents: Contents, config: str, epoch: int, best: bool) -> Path:
    """Writes a checkpoint below `folder` and lets `last`, and if it is the best so far `best`, point to it.

    Args:
        folder: the run's folder of checkpoints; it is made if need be.
        contents: what to write.
        config: the settings as YAML.
        epoch: names the checkpoint.
        best: whether this is the best checkpoint so far.

    Returns:
        the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / STAGED
    for leftover in set(folder.glob(UNFINISHED + "*")) - ({staged} if contents.loss is None else set()):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    number = 0
    while (final := folder / f"epoch_{epoch:04d}{f'.{number}' if number else ''}").exists():
        number += 1  # an earlier run got as far, then was killed or resumed from before
    unfinished = folder / (UNFINISHED + final.name)
    staged.rename(unfinished) if contents.loss is None else unfinished.mkdir()
    buffer = io.BytesIO()
    torch.save(contents.training, buffer)
    for name, tensors in ((MODEL, contents.model), (LOSS, contents.loss)):
        if tensors is not None:
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            _write(unfinished / name, safetensors.torch.save(on_cpu))
    _write(unfinished / TRAINING, buffer.getvalue())
    _write(unfinished / CONFIG, config.encode())
    _sync_folder(unfinished)
    unfinished.rename(final)
    _sync_folder(folder)
    for pointer in ["best", "last"] if best else ["last"]:
        link = folder / (UNFINISHED + pointer)
        link.symlink_to(final.name)
        link.replace(folder / pointer)
    _sync_folder(folder)
    _remove_unused(folder)
    return final


def stage_rows(folder: Path, tensors: dict[str, Tensor], shard: ClassShard) -> None:
    """Writes the ranks' rows to a folder that the next `save` below `folder` takes in; every rank calls it."""
    staged = folder / STAGED
    if rank() == 0:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    barrier()
    sharded_checkpoint.write(staged / LOSS_FOLDER, tensors, AXES, shard)
    barrier()


def config_file(checkpoint: Path) -> Path:
    """The settings' file of a checkpoint.

    Raises:
        UserError: `checkpoint` is not a checkpoint's folder.
    """
    for name in (MODEL, CONFIG):
        if not (checkpoint / name).is_file():
            raise UserError(f"checkpoint {checkpoint} has no file {name}; a checkpoint is a folder like .../last")
    return checkpoint / CONFIG


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """Parameters and buffers of ReidModel, on the CPU.

    Raises:
        UserError: the file is damaged or missing.
    """
    config_file(checkpoint)
    return first_edition.of_model(_read(checkpoint / MODEL))


def load_loss(checkpoint: Path, shard: ClassShard | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of the criterion, on the CPU; with a shard only its rows of those in AXES.

    Raises:
        UserError: a file is damaged or missing, or the checkpoint has not as many classes as the shard is of.
    """
    config_file(checkpoint)
    folder, file = checkpoint / LOSS_FOLDER, checkpoint / LOSS
    if folder.is_dir():
        _require_classes(checkpoint, sharded_checkpoint.classes(folder, AXES), shard)
        ...

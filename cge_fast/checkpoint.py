"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder with model.safetensors, training.pt and config.yaml. It is written under another name, fsynced
and renamed, so that a folder called epoch_* is always whole. `last` and `best` are symbolic links, each replaced by one
rename; folders that neither points to are removed after that.
"""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cge_fast.errors import UserError

UNFINISHED = ".unfinished-"  # prefix of what is being written, pointed elsewhere or removed
WEIGHTS, TRAINING, CONFIG = "model.safetensors", "training.pt", "config.yaml"
MEMORY, CLASSIFIER = "head.memory", "head.classifier.weight"  # names among the weights


def save(folder: Path, model: nn.Module, training: dict[str, Any], config: str, epoch: int, best: bool) -> Path:
    """Writes a checkpoint below `folder` and lets `last`, and if it is the best so far `best`, point to it.

    Args:
        folder: the run's folder of checkpoints; it is made if need be.
        model: its parameters and buffers are written, the memory among them.
        training: what else the training needs to go on: tensors and plain values only.
        config: the settings as YAML.
        epoch: names the checkpoint.
        best: whether this is the best checkpoint so far.

    Returns:
        the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(UNFINISHED + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    number = 0
    while (final := folder / f"epoch_{epoch:04d}{f'.{number}' if number else ''}").exists():
        number += 1  # an earlier run got as far, then was killed or resumed from before
    unfinished = folder / (UNFINISHED + final.name)
    unfinished.mkdir()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(training, buffer)
    _write(unfinished / WEIGHTS, safetensors.torch.save(state))
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


def config_file(checkpoint: Path) -> Path:
    """The settings' file of a checkpoint.

    Raises:
        UserError: `checkpoint` is not a checkpoint's folder.
    """
    for name in (WEIGHTS, TRAINING, CONFIG):
        if not (checkpoint / name).is_file():
            raise UserError(f"checkpoint {checkpoint} has no file {name}; a checkpoint is a folder like .../last")
    return checkpoint / CONFIG


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint, on the CPU.

    Raises:
        UserError: the weights' file is damaged.
    """
    config_file(checkpoint)
    try:
        return safetensors.torch.load_file(checkpoint / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise UserError(f"checkpoint {checkpoint / WEIGHTS} cannot be read ({error})") from error


def load_training(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `training`, on the CPU.

    Raises:
        UserError: the file is damaged, or holds more than tensors and plain values.
    """
    config_file(checkpoint)
    try:
        return dict(torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        raise UserError(f"checkpoint {checkpoint / TRAINING} cannot be read ({error})") from error


def classes(weights: dict[str, Tensor], checkpoint: Path) -> int:
    """How many identities a checkpoint's network was trained on.

    Raises:
        UserError: the weights are not those of a re-identification network.
    """
    if CLASSIFIER not in weights:
        raise UserError(f"checkpoint {checkpoint / WEIGHTS} has no {CLASSIFIER}: it is of another kind of network")
    return len(weights[CLASSIFIER])


def fit(model: nn.Module, weights: dict[str, Tensor], checkpoint: Path) -> None:
    """Loads the weights into a model that must match them wholly.

    Raises:
        UserError: a tensor is missing, left over or of another shape; classes and stripes are named as such.
    """
    wanted = model.state_dict()
    memory, wanted_memory = weights.get(MEMORY), wanted.get(MEMORY)
    found_classes, wanted_classes = classes(weights, checkpoint), len(wanted[CLASSIFIER])
    if (memory is None) != (wanted_memory is None):
        has, wants = ("no memory", "one") if memory is None else ("a memory", "none")
        raise UserError(f"model.cge: checkpoint {checkpoint} has {has}, the settings want {wants}")
    if found_classes != wanted_classes:
        raise UserError(f"data: checkpoint {checkpoint} has {found_classes} classes, the data set {wanted_classes}")
    if memory is not None and len(memory) != len(wanted_memory):
        raise UserError(
            f"model.stripes: checkpoint {checkpoint} has {len(memory)} stripes, the settings want {len(wanted_memory)}"
        )
    different = sorted(wanted.keys() ^ weights.keys()) or [
        name for name in wanted if wanted[name].shape != weights[name].shape
    ]
    if different:
        raise UserError(f"model: checkpoint {checkpoint} does not fit the settings' network, first at {different[0]}")
    model.load_state_dict(weights)


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unused(folder: Path) -> None:
    used = {(folder / pointer).resolve() for pointer in ("last", "best")}
    for checkpoint in folder.glob("epoch_*"):
        if checkpoint.resolve() not in used:
            leftover = checkpoint.rename(folder / (UNFINISHED + checkpoint.name))
            shutil.rmtree(leftover)

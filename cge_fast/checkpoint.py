"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder with model.safetensors (what is deployed), loss.safetensors, training.pt and config.yaml. With
model.shard_checkpoints the folder `loss` takes the place of loss.safetensors and of Adam's moments of the classifier.
It is written under another name, fsynced and renamed, so that a folder called epoch_* is always whole. `last` and
`best` are symbolic links, each replaced by one rename; folders that neither points to are removed after that.
"""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cge_fast import first_edition
from cge_fast.distributed import barrier, rank
from cge_fast.errors import UserError
from cge_kernels import ClassShard

UNFINISHED = ".unfinished-"  # prefix of what is being written, pointed elsewhere or removed
MODEL, LOSS, TRAINING, CONFIG = "model.safetensors", "loss.safetensors", "training.pt", "config.yaml"
LOSS_FOLDER = "loss"
IDENTITIES = "identities"  # in the metadata of the .safetensors
CLASSIFIER, MEMORY = "classification.weight", "classification.memory"  # names among the criterion's tensors
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, of the classifier
AXES = {CLASSIFIER: 0, MEMORY: 1} | dict.fromkeys(MOMENTS, 0)  # what has a row for each class, and along which axis
STAGED = ".unfinished-loss"  # where the ranks' rows wait for the checkpoint that they belong to


class Contents(NamedTuple):
    """What a checkpoint holds."""

    identities: int  # of the training set: the classes of the loss
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
            _write(unfinished / name, safetensors.torch.save(on_cpu, {IDENTITIES: str(contents.identities)}))
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
    from cge_fast import sharded_checkpoint  # which takes a second

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
    with _readable(checkpoint / MODEL):
        weights = first_edition.of_model(safetensors.torch.load_file(checkpoint / MODEL))
    if "neck.weight" not in weights:
        raise UserError(f"checkpoint {checkpoint / MODEL} has no neck.weight: it is of another kind of network")
    return weights


def load_loss(checkpoint: Path, shard: ClassShard | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of the criterion, on the CPU; with a shard only its rows of those in AXES.

    Raises:
        UserError: a file is damaged or missing, or the checkpoint has not as many classes as the shard is of.
    """
    config_file(checkpoint)
    if shard and (count := identities(checkpoint)) != shard.classes:
        raise UserError(f"data: checkpoint {checkpoint} has {count} classes, the data set {shard.classes}")
    if (folder := checkpoint / LOSS_FOLDER).is_dir():
        from cge_fast import sharded_checkpoint  # which takes a second

        tensors = sharded_checkpoint.read(folder, AXES, shard)
        return {name: tensor for name, tensor in tensors.items() if name not in MOMENTS}
    if (checkpoint / LOSS).exists():
        with _readable(checkpoint / LOSS), safe_open(checkpoint / LOSS, "pt") as file:
            return {name: _rows(file, name, shard) for name in file.keys()}  # noqa: SIM118, a file is no dict
    with _readable(checkpoint / MODEL):
        tensors = first_edition.read_loss(checkpoint, checkpoint / MODEL, shard)
    centers = load_training(checkpoint).get("centres")
    return tensors if centers is None else tensors | {"center.centers": centers}


def identities(checkpoint: Path) -> int:
    """How many identities a checkpoint's network was trained on.

    Raises:
        UserError: a file is damaged or missing, or of another kind of network.
    """
    with _readable(checkpoint / MODEL), safe_open(checkpoint / MODEL, "pt") as file:
        metadata = file.metadata() or {}
        if IDENTITIES in metadata:
            return int(metadata[IDENTITIES])
        return first_edition.rows_files(checkpoint, checkpoint / MODEL)[-1][1]


def load_moments(checkpoint: Path, moments: dict[str, Tensor], shard: ClassShard | None) -> dict[str, Tensor]:
    """Adam's moments of the classifier (N, C), or of a shard's rows.

    moments: what the optimizer's state in `load_training` holds, which is none of them if each rank wrote its rows.
    """
    if (folder := checkpoint / LOSS_FOLDER).is_dir():
        from cge_fast import sharded_checkpoint  # which takes a second

        tensors = sharded_checkpoint.read(folder, AXES, shard)
        return {name: tensors[name] for name in MOMENTS}
    if MOMENTS[0] not in moments:
        return first_edition.read_moments(checkpoint, shard)
    # Copies: a part of a tensor would keep the whole of it in memory.
    return {name: moments[name][shard.rows].clone() if shard else moments[name] for name in MOMENTS}


def load_training(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `training`, on the CPU.

    Raises:
        UserError: the file is damaged, or holds more than tensors and plain values.
    """
    config_file(checkpoint)
    try:
        # Mapped into memory: a shard's rows are read without the rest.
        return dict(torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        raise UserError(f"checkpoint {checkpoint / TRAINING} cannot be read ({error})") from error


def fit(module: nn.Module, tensors: dict[str, Tensor], checkpoint: Path) -> None:
    """Loads the tensors into a model or criterion that must match them wholly, but for centers that it has not.

    Raises:
        UserError: a tensor is missing, left over or of another shape; classes and stripes are named as such.
    """
    own = module.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name in own or not name.startswith("center.")}
    if (MEMORY in tensors) != (MEMORY in own):
        has, wants = ("a memory", "none") if MEMORY in tensors else ("no memory", "one")
        raise UserError(f"model.cge: checkpoint {checkpoint} has {has}, the settings want {wants}")
    for option, name, what, wanting in (
        ("data", CLASSIFIER, "classes", "data set"),
        ("model.stripes", MEMORY, "stripes", "settings want"),
    ):
        count, wanted = (len(found[name]) if name in found else 0 for found in (tensors, own))
        if count != wanted:
            raise UserError(f"{option}: checkpoint {checkpoint} has {count} {what}, the {wanting} {wanted}")
    different = sorted(own.keys() ^ tensors.keys()) or [name for name in own if own[name].shape != tensors[name].shape]
    if different:
        raise UserError(f"model: checkpoint {checkpoint} does not fit the settings' network, first at {different[0]}")
    module.load_state_dict(tensors)


def _rows(file: safe_open, name: str, shard: ClassShard | None) -> Tensor:
    """A tensor of a file, or a shard's rows of it."""
    if shard is None or name not in AXES:
        return file.get_tensor(name)
    part = file.get_slice(name)
    return part[shard.rows] if AXES[name] == 0 else part[:, shard.rows]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({error})") from error


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

"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder with model.safetensors, training.pt and config.yaml. With model.shard_checkpoints the rows of
the identities, and Adam's moments of them, are in files classes-<first>-<end>-of-<N>.safetensors beside them. It is
written under another name, fsynced and renamed, so that a folder called epoch_* is always whole. `last` and `best` are
symbolic links, each replaced by one rename; folders that neither points to are removed after that.
"""

import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cge_fast.distributed import Shard, barrier, rank
from cge_fast.errors import UserError

UNFINISHED = ".unfinished-"  # prefix of what is being written, pointed elsewhere or removed
WEIGHTS, TRAINING, CONFIG = "model.safetensors", "training.pt", "config.yaml"
MEMORY, CLASSIFIER = "head.memory", "head.classifier.weight"  # names among the weights
SHARDED = {CLASSIFIER: 0, MEMORY: 1}  # the weights with a row for each identity, and along which axis
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, of the classifier
STAGED = ".unfinished-rows"  # where the ranks' files wait for the checkpoint that they belong to
ROWS_FILE = re.compile(r"classes-(\d+)-(\d+)-of-(\d+)\.safetensors")


def save(
    folder: Path,
    weights: dict[str, Tensor],
    training: dict[str, Any],
    config: str,
    epoch: int,
    best: bool,
    staged_rows: bool = False,
) -> Path:
    """Writes a checkpoint below `folder` and lets `last`, and if it is the best so far `best`, point to it.

    Args:
        folder: the run's folder of checkpoints; it is made if need be.
        weights: parameters and buffers by name, the memory among them.
        training: what else the training needs to go on: tensors and plain values only.
        config: the settings as YAML.
        epoch: names the checkpoint.
        best: whether this is the best checkpoint so far.
        staged_rows: take in what `stage_rows` wrote just before. Without it that is what a killed save left behind.

    Returns:
        the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / STAGED
    for leftover in set(folder.glob(UNFINISHED + "*")) - ({staged} if staged_rows else set()):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    number = 0
    while (final := folder / f"epoch_{epoch:04d}{f'.{number}' if number else ''}").exists():
        number += 1  # an earlier run got as far, then was killed or resumed from before
    unfinished = folder / (UNFINISHED + final.name)
    staged.rename(unfinished) if staged_rows else unfinished.mkdir()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
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


def stage_rows(folder: Path, rows: dict[str, Tensor], shard: Shard) -> None:
    """Writes this rank's rows to a file that the next `save` below `folder` takes in; every rank calls it."""
    staged = folder / STAGED
    if rank() == 0:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    barrier()
    write_rows(folder, rows, shard)
    barrier()


def write_rows(folder: Path, rows: dict[str, Tensor], shard: Shard) -> None:
    """One rank's part of `stage_rows`."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in rows.items()}
    name = f"classes-{shard.first:010d}-{shard.rows.stop:010d}-of-{shard.classes:010d}.safetensors"
    _write(folder / STAGED / name, safetensors.torch.save(content))


def load_weights(checkpoint: Path, shard: Shard | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint, on the CPU; with a shard only its rows of those in `SHARDED`.

    Raises:
        UserError: a file is damaged or missing, or the checkpoint has not as many classes as the shard is of.
    """
    config_file(checkpoint)
    try:
        with safetensors.safe_open(checkpoint / WEIGHTS, "pt") as file:
            rows_files = find_rows(checkpoint)
            if (shard and CLASSIFIER in [*file.keys()]) or rows_files:
                found = rows_files[-1][1] if rows_files else file.get_slice(CLASSIFIER).get_shape()[0]
                if shard and found != shard.classes:
                    raise UserError(f"data: checkpoint {checkpoint} has {found} classes, the data set {shard.classes}")
            weights = {
                name: _rows(file, name, shard.rows, SHARDED[name])
                if shard and name in SHARDED
                else file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118, a file is no dict
            }
        for name, axis in SHARDED.items() if rows_files else ():
            weights[name] = _join(rows_files, name, shard, axis)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {checkpoint / WEIGHTS} cannot be read ({error})") from error
    return weights


def load_moments(checkpoint: Path, moments: dict[str, Tensor], shard: Shard | None) -> dict[str, Tensor]:
    """Adam's moments of the classifier (N, C), or of a shard's rows.

    moments: what the optimiser's state in `load_training` holds, which is none of them if the ranks' files do.
    """
    rows_files = find_rows(checkpoint)
    if rows_files:
        return {name: _join(rows_files, name, shard, 0) for name in MOMENTS}
    # Copies: a part of a tensor would keep the whole of it in memory.
    return {name: moments[name][shard.rows].clone() if shard else moments[name] for name in MOMENTS}


def find_rows(checkpoint: Path) -> list[tuple[int, int, Path]]:
    """First class, end and file of each rank's rows, in order; none if the checkpoint is whole.

    Raises:
        UserError: a file is missing.
    """
    matches = [(match, path) for path in checkpoint.iterdir() if (match := ROWS_FILE.fullmatch(path.name))]
    found = sorted((int(match[1]), int(match[2]), path) for match, path in matches)
    ends = [0, *(end for _, end, _ in found)]
    firsts = [*(first for first, _, _ in found), *{int(match[3]) for match, _ in matches}]
    for end, first in zip(ends, firsts, strict=False):  # each file begins where the one before ends
        if end != first:
            raise UserError(f"checkpoint {checkpoint} has no file with the rows of classes {end} to {first - 1}")
    return found


def _rows(file: Any, name: str, rows: slice, axis: int) -> Tensor:
    part = file.get_slice(name)
    return part[rows] if axis == 0 else part[:, rows]


def _join(rows_files: list[tuple[int, int, Path]], name: str, shard: Shard | None, axis: int) -> Tensor:
    """A tensor's rows, all or a shard's, from the ranks' files."""
    wanted = shard.rows if shard else slice(0, rows_files[-1][1])
    parts = []
    for first, end, path in rows_files:
        start, stop = max(first, wanted.start) - first, min(end, wanted.stop) - first
        if start < stop:
            try:
                with safetensors.safe_open(path, "pt") as file:
                    parts.append(_rows(file, name, slice(start, stop), axis))
            except safetensors.SafetensorError as error:
                raise UserError(f"checkpoint {path} cannot be read ({error})") from error
    return torch.cat(parts, dim=axis)


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

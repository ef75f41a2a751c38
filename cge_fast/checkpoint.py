"""Checkpoints that survive a kill at any moment, and that notice when they were damaged.

A checkpoint is a folder with model.safetensors (what is deployed), loss.safetensors, training.pt, config.yaml,
names.json if the data set has names, and, written last, manifest.json: the epoch, the SHA-256 of every file but
config.yaml, and which settings that has. With model.shard_checkpoints the folder `loss` takes the place of
loss.safetensors and of the classifier's moments. `last` and `best` are written under another name and then renamed
(files.replace_folder). Without a manifest, as in version 0.1 and where model.safetensors and config.yaml alone are
deployed, a folder is read without these checks.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cge_fast import files, first_edition
from cge_fast.cli import flat, load_yaml
from cge_fast.distributed import barrier, rank
from cge_fast.errors import UserError
from cge_kernels import ClassShard

MODEL, LOSS, TRAINING, CONFIG = "model.safetensors", "loss.safetensors", "training.pt", "config.yaml"
MANIFEST = "manifest.json"
NAMES = "names.json"  # what the training set calls its identities and cameras, if it does
LOSS_FOLDER = "loss"
IDENTITIES = "identities"  # in the metadata of the .safetensors
CLASSIFIER, MEMORY = "classification.weight", "classification.memory"  # names among the criterion's tensors
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # Adam's and SGD's, of the classifier
AXES = {CLASSIFIER: 0, MEMORY: 1} | dict.fromkeys(MOMENTS, 0)  # what has a row for each class, and along which axis
STAGED = ".staged-loss"  # where the ranks' rows wait for the checkpoint that they belong to


class Contents(NamedTuple):
    """What a checkpoint holds."""

    identities: int  # of the training set: the classes of the loss
    model: dict[str, Tensor]  # parameters and buffers of ReidModel
    loss: dict[str, Tensor] | None  # and of the criterion; None if `stage_rows` wrote them just before
    training: dict[str, Any]  # what else a training needs to go on: tensors and plain values only
    rows: Mapping[str, str] = MappingProxyType({})  # what `stage_rows` gave
    names: Mapping[str, list[str]] = MappingProxyType({})  # what `data.images.names` gave


def save(folder: Path, contents: Contents, config: str, epoch: int, best: bool) -> None:
    """Writes the checkpoint `last` below `folder`, and if it is the best so far the same as `best`.

    Args:
        folder: the run's folder of checkpoints; it is made if need be.
        contents: what to write.
        config: the settings as YAML.
        epoch: of the checkpoint.
        best: whether this is the best checkpoint so far.

    Raises:
        OSError: the disk is full, or the like; what was there before still is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files.mend(folder)
    staged, unfinished = folder / STAGED, folder / f"{files.UNFINISHED}last"
    if contents.loss is not None:
        files.remove(staged)  # of a save that was killed
    try:
        unfinished.mkdir() if contents.loss is not None else staged.rename(unfinished)
        digests = dict(contents.rows)

        def add(name: str, content: bytes) -> None:
            files.write(unfinished / name, content)
            digests[name] = hashlib.sha256(content).hexdigest()

        buffer = io.BytesIO()
        torch.save(contents.training, buffer)
        add(TRAINING, buffer.getvalue())
        for name, tensors in ((MODEL, contents.model), (LOSS, contents.loss)):
            if tensors is not None:
                on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                add(name, safetensors.torch.save(on_cpu, {IDENTITIES: str(contents.identities)}))
        if contents.names:
            add(NAMES, json.dumps(contents.names, indent=1).encode())
        files.write(unfinished / CONFIG, config.encode())
        settings = [name for name, _ in flat(yaml.safe_load(config))]
        manifest = {"epoch": epoch, "settings": settings, "sha256": digests}
        files.write(unfinished / MANIFEST, json.dumps(manifest, indent=1).encode())
        if best:
            files.copy_folder(unfinished, folder / f"{files.UNFINISHED}best")
            files.replace_folder(folder / "best", folder / f"{files.UNFINISHED}best")
        files.replace_folder(folder / "last", unfinished)
    finally:
        files.mend(folder)


def stage_rows(folder: Path, tensors: dict[str, Tensor], shard: ClassShard) -> dict[str, str]:
    """Writes the ranks' rows to a folder that the next `save` below `folder` takes in; every rank calls it.

    Returns:
        the SHA-256 of the files, by their names in the checkpoint.
    """
    staged = folder / STAGED
    if rank() == 0:
        files.remove(staged)
        staged.mkdir(parents=True)
    barrier()
    from cge_fast import sharded_checkpoint  # which takes a second

    digests = sharded_checkpoint.write(staged / LOSS_FOLDER, tensors, AXES, shard)
    return {f"{LOSS_FOLDER}/{name}": digest for name, digest in digests.items()}


def opened(checkpoint: Path | str) -> Path:
    """The folder of a checkpoint that is given as such, by one of its files, or by its run's folder (`last`).

    Raises:
        UserError: there is no checkpoint.
    """
    folder = files.at_home(Path(checkpoint))
    if folder.is_file():
        folder = folder.parent
    elif (of_run := files.located(folder / "checkpoints" / "last")).is_dir():
        folder = of_run
    folder = files.located(folder)
    for name in (MODEL, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"checkpoint {checkpoint} has no file {name}; a checkpoint is a folder like .../last")
    return folder


def config_file(checkpoint: Path | str) -> Path:
    """The settings' file of a checkpoint.

    Raises:
        UserError: `checkpoint` is not a checkpoint's folder, or the file was cut short.
    """
    file = opened(checkpoint) / CONFIG
    missing = read_manifest(file.parent).get("settings", set()) - {name for name, _ in flat(load_yaml(file))}
    if missing:
        raise UserError(f"checkpoint {file} was cut short: it has no {min(missing)}")
    return file


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; empty without one.

    Raises:
        UserError: the file is damaged.
    """
    file = checkpoint / MANIFEST
    if not file.exists():
        return {}
    try:
        manifest = json.loads(file.read_bytes())
        return {"epoch": manifest["epoch"], "settings": {*manifest["settings"]}, "sha256": {**manifest["sha256"]}}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint {file} cannot be read ({error})") from error


def verified(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint, which is as it was written.

    Raises:
        UserError: it is missing, or not the one that the manifest is of.
    """
    file, manifest = checkpoint / name, read_manifest(checkpoint)
    if not file.is_file():
        raise UserError(f"checkpoint {checkpoint} has no file {name}")
    if manifest and files.sha256(file) != manifest["sha256"].get(name):
        told = f"the one in {MANIFEST}, of epoch {manifest['epoch']}"
        raise UserError(f"checkpoint {file} is damaged, or of another checkpoint: its SHA-256 is not {told}")
    return file


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """Parameters and buffers of ReidModel, on the CPU.

    Raises:
        UserError: the file is damaged or missing.
    """
    checkpoint = opened(checkpoint)
    with _readable(checkpoint / MODEL):
        weights = first_edition.of_model(safetensors.torch.load_file(verified(checkpoint, MODEL)))
    require_finite(weights, checkpoint / MODEL)
    if "neck.weight" not in weights:
        raise UserError(f"checkpoint {checkpoint / MODEL} has no neck.weight: it is of another kind of network")
    return weights


def load_loss(checkpoint: Path, shard: ClassShard | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of the criterion, on the CPU; with a shard only its rows of those in AXES.

    Raises:
        UserError: a file is damaged or missing, or the checkpoint has not as many classes as the shard is of.
    """
    checkpoint = opened(checkpoint)
    if shard and (count := identities(checkpoint)) != shard.classes:
        raise UserError(f"data: checkpoint {checkpoint} has {count} classes, the data set {shard.classes}")
    if (checkpoint / LOSS_FOLDER).is_dir():
        tensors = {name: tensor for name, tensor in _read_rows(checkpoint, shard).items() if name not in MOMENTS}
    elif (checkpoint / LOSS).exists() or read_manifest(checkpoint):
        with _readable(checkpoint / LOSS), safe_open(verified(checkpoint, LOSS), "pt") as file:
            tensors = {name: _rows(file, name, shard) for name in file.keys()}  # noqa: SIM118, a file is no dict
    else:
        with _readable(checkpoint / MODEL):
            tensors = first_edition.read_loss(checkpoint, checkpoint / MODEL, shard)
        centers = load_training(checkpoint).get("centres")
        tensors |= {} if centers is None else {"center.centers": centers}
    require_finite(tensors, checkpoint / LOSS)
    return tensors


def identities(checkpoint: Path) -> int:
    """How many identities a checkpoint's network was trained on.

    Raises:
        UserError: a file is damaged or missing, or of another kind of network.
    """
    checkpoint = opened(checkpoint)
    with _readable(checkpoint / MODEL), safe_open(checkpoint / MODEL, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get(IDENTITIES, "").isdecimal():
            return int(metadata[IDENTITIES])
        return first_edition.rows_files(checkpoint, checkpoint / MODEL)[-1][1]


def names(checkpoint: Path) -> dict[str, list[str]]:
    """Of the training set: its `identities`, in the order of the classes, and `cameras`; empty if they have no names.

    Raises:
        UserError: the file is damaged.
    """
    checkpoint = opened(checkpoint)
    if not (checkpoint / NAMES).exists() and NAMES not in read_manifest(checkpoint).get("sha256", {}):
        return {}
    try:
        return dict(json.loads(verified(checkpoint, NAMES).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"checkpoint {checkpoint / NAMES} cannot be read ({error})") from error


def load_moments(checkpoint: Path, moments: dict[str, Tensor], shard: ClassShard | None) -> dict[str, Tensor]:
    """The optimizer's moments of the classifier (N, C), or of a shard's rows.

    moments: what the optimizer's state in `load_training` holds, which is none of them if each rank wrote its rows.
    """
    if (checkpoint / LOSS_FOLDER).is_dir():
        tensors = _read_rows(checkpoint, shard)
        return {name: tensors[name] for name in MOMENTS if name in tensors}
    own = [name for name in MOMENTS if name in moments]
    if not own:
        return first_edition.read_moments(checkpoint, shard)
    # Copies: a part of a tensor would keep the whole of it in memory.
    return {name: moments[name][shard.rows].clone() if shard else moments[name] for name in own}


def load_training(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `training`, on the CPU.

    Raises:
        UserError: the file is damaged, or holds more than tensors and plain values.
    """
    file = verified(opened(checkpoint), TRAINING)
    try:
        files.require_intact(file)
        # Mapped into memory: a shard's rows are read without the rest.
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        raise UserError(f"checkpoint {file} cannot be read ({error})") from error


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


def require_finite(tensors: Mapping[str, Tensor], file: Path | str) -> None:
    """Raises UserError, which names the file and the tensor, if a number is infinite or none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{file}: {name} is not finite: the file is damaged, or of a training that diverged")


def _read_rows(checkpoint: Path, shard: ClassShard | None) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint, or a shard's rows of them."""
    from cge_fast import sharded_checkpoint  # which takes a second

    def check(file: Path) -> None:
        verified(checkpoint, f"{LOSS_FOLDER}/{file.name}")

    return sharded_checkpoint.read(checkpoint / LOSS_FOLDER, AXES, shard, check)


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

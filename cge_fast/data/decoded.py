"""Images as pixels of one size, read from their files every time or kept: in memory, or in a file mapped into it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cge_fast import files
from cge_fast.data.images import Image, opened
from cge_fast.distributed import rank
from cge_fast.errors import UserError, notice
from cge_fast.options import DataConfig
from cge_fast.progress import progress

PIXELS, MANIFEST = "pixels", "manifest.json"  # of a cache's folder: (images, H, W, 3) uint8, and what they are of
BATCH = 64  # images that are decoded at a time to be kept

_kept: dict[str, Tensor] = {}  # by `fingerprint`, for every loader of this process and for its workers


class Decoded(Dataset):
    """Images (H, W, 3) uint8, each read and resized when it is asked for."""

    def __init__(self, images: Sequence, config: DataConfig):
        self.images, self.size = images, (config.width, config.height)
        self.interpolation = PIL.Image.Resampling[config.interpolation.upper()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        picture = opened(self.images[index], self.size)
        return torch.from_numpy(np.array(picture.resize(self.size, self.interpolation)))


def decoded(images: Sequence, config: DataConfig) -> Dataset | Tensor:
    """The images (H, W, 3) uint8 by number: a Decoded, or as `data.cache` says all of them as one tensor.

    Raises:
        UserError: they are to be kept, and an image cannot be read or memory is short.
        OSError: the disk is full, or the like.
    """
    source = Decoded(images, config)
    if config.cache == "none" or not images:
        return source
    key = fingerprint(images, config)
    if key not in _kept:
        keep = in_memory if config.cache == "ram" else partial(on_disk, of=key)
        _kept[key] = keep(source, config)
    return _kept[key]


def fingerprint(images: Sequence[Image], config: DataConfig) -> str:
    """SHA-256 of what the pixels depend on: the files' paths, sizes and times, and how they are decoded."""
    digest = hashlib.sha256(f"{config.cache} {recipe(config)} {PIL.__version__}\n".encode())
    for image in images:
        with suppress(OSError):  # a missing file is named when it is read
            stat = image.path.stat()
            digest.update(f"{image.path.absolute()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def recipe(config: DataConfig) -> str:
    """Size and interpolation."""
    return f"{config.height}x{config.width} {config.interpolation}"


def batches(source: Decoded, config: DataConfig) -> Iterator[Tensor]:
    """All images in order, (B, H, W, 3), with a progress bar; the training's own random numbers are not disturbed."""
    loader = DataLoader(source, BATCH, num_workers=config.workers, generator=torch.Generator())
    return iter(progress(loader, what=f"data.cache {config.cache}", unit="batches", show=rank() == 0))


def in_memory(source: Decoded, config: DataConfig) -> Tensor:
    """(images, H, W, 3) uint8 in this process's memory, which the workers that it forks share."""
    size, free = len(source) * config.height * config.width * 3, available_memory()
    if size > free:
        needs = f"{size / 1e9:.1f} GB of memory for {len(source)} images, and {free / 1e9:.1f} GB are free"
        raise UserError(f"data.cache: ram needs {needs}; use disk or none")
    pixels = torch.empty(len(source), config.height, config.width, 3, dtype=torch.uint8)
    for place, batch in zip(pixels.split(BATCH), batches(source, config), strict=True):
        place.copy_(batch)
    return pixels


def available_memory() -> int:
    """Bytes that can be had without swapping, as Linux says."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def on_disk(source: Decoded, config: DataConfig, of: str) -> Tensor:
    """(images, H, W, 3) uint8, mapped into memory from the cache's folder, where it is written if need be.

    Processes that want the same images at the same time wait for the one that writes them.
    """
    names = "\n".join([recipe(config), *(str(image.path.absolute()) for image in source.images)])
    folder = files.cache_home() / f"pixels-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
    shape = len(source), config.height, config.width, 3
    if why := unusable(folder, of):
        notice(f"data.cache: {folder} {why}, it is made anew")
        with files.turn_in(folder.parent):
            if unusable(folder, of):  # still, and not what another process has made anew
                files.remove(folder)
    files.once(folder, partial(write, source=source, config=config, of=of))
    size = (folder / PIXELS).stat().st_size
    return torch.from_file(str(folder / PIXELS), size=size, dtype=torch.uint8).view(shape)


def unusable(folder: Path, of: str) -> str:
    """What is wrong with a cache's folder; "" if nothing is, or there is none."""
    if not folder.exists():
        return ""
    try:
        manifest = files.read_json(folder / MANIFEST)
        if manifest["of"] != of:
            return "is of images or of a Pillow that have changed since"
        return "" if files.sha256(folder / PIXELS) == manifest["sha256"] else "is damaged"
    except (OSError, UserError, KeyError):
        return "is damaged"


def write(folder: Path, source: Decoded, config: DataConfig, of: str) -> None:
    """Writes a cache's folder, whole or not at all."""
    with files.new_folder(folder) as unfinished:
        files.write(unfinished / PIXELS, (batch.numpy().tobytes() for batch in batches(source, config)))
        manifest = {"of": of, "sha256": files.sha256(unfinished / PIXELS)}
        files.write(unfinished / MANIFEST, json.dumps(manifest).encode())

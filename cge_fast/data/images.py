"""What a re-identification data set is, and how one of its images is read."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import PIL.Image
from tqdm import tqdm

from cge_fast.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png"}
MOST_SHOWN = 6  # names of a folder in an error
TOO_LARGE = (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError)
UNREADABLE = (OSError, SyntaxError, ValueError, *TOO_LARGE)  # what Pillow raises for damaged files


@dataclass(frozen=True)
class Image:
    """One image file, who is in it and which camera took it."""

    path: Path
    identity: int
    camera: int


@dataclass(frozen=True)
class ReidSet:
    """Training images; queries, and the gallery that they are looked for in. Test identities are other people."""

    train: list[Image]
    query: list[Image]
    gallery: list[Image]


def missing(kind: Literal["file", "folder"], path: Path, option: str = "data.root") -> UserError:
    """The error that names what is not there, and what the nearest folder above it holds instead."""
    above = next(folder for folder in path.absolute().parents if folder.is_dir())
    names = sorted(entry.name for entry in above.iterdir())
    shown = [f"{name}/" if (above / name).is_dir() else name for name in names[:MOST_SHOWN]]
    more = [f"{len(names) - MOST_SHOWN} more"] if len(names) > MOST_SHOWN else []
    return UserError(f"{option}: there is no {kind} {path}; {above} holds {', '.join(shown + more) or 'nothing'}")


def file_at(path: Path) -> Path:
    """`path` itself; UserError if there is no such file."""
    if not path.is_file():
        raise missing("file", path)
    return path


def all_there(images: list[Image], folder: Path, file: Path) -> list[Image]:
    """The images below `folder` that an archive's list `file` names; UserError if there are none, or one is missing."""
    if not folder.is_dir():
        raise missing("folder", folder)
    if not images:
        raise UserError(f"{file} lists no image: the archive is not whole")
    for image in images:
        if not image.path.is_file():
            raise UserError(f"image {image.path} is missing, but {file} lists it: the archive is not whole")
    return images


def image_files(folder: Path, option: str = "data.root") -> list[Path]:
    """The jpg and png files below a folder, at any depth, sorted; UserError, which names `option`, if there is none."""
    if not folder.is_dir():
        raise missing("folder", folder, option)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{option}: {folder} holds no jpg or png image")
    return files


def open_rgb(path: Path) -> PIL.Image.Image:
    """Reads an image whole, as RGB; UserError if the file is missing, empty or corrupt."""
    try:
        with warnings.catch_warnings(), PIL.Image.open(path) as image:
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            return image.convert("RGB")
    except UNREADABLE as error:
        raise UserError(
            f"image {path} cannot be read ({error}); mend or remove it (trained or evaluated on, such images are left "
            "out with --data.skip_corrupt true)"
        ) from error


def without_corrupt(reid_set: ReidSet) -> tuple[ReidSet, list[Path]]:
    """The set without the images that cannot be read, and those images' paths. Reads every file."""
    corrupt = []
    images = [image for part in vars(reid_set).values() for image in part]
    for image in tqdm(images, desc="checking images", unit=" image"):
        try:
            open_rgb(image.path)
        except UserError:
            corrupt.append(image.path)
    left_out = set(corrupt)
    parts = ([image for image in part if image.path not in left_out] for part in vars(reid_set).values())
    return ReidSet(*parts), corrupt

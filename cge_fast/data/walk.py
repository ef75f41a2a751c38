"""Which files below a folder are images: one walk, with the same rules, for every reader."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from cge_fast.errors import UserError, notice

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
KINDS = "jpg, png, webp, bmp or tif"
MOST_SHOWN = 6  # names in a line
# What file managers, network drives and archives leave behind; so is whatever begins with a dot.
OF_TOOLS = {
    *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}


class AbsentError(UserError):
    """A part of the data set is not there, or holds no image."""


def of_a_tool(name: str) -> bool:
    """Whether a program left an entry of this name, which is no part of a data set."""
    return name.startswith(".") or name.lower() in OF_TOOLS


def missing(kind: Literal["file", "folder"], path: Path, option: str = "data.root") -> AbsentError:
    """The error that names what is not there, and what the nearest folder above it holds instead."""
    above = next(folder for folder in path.absolute().parents if folder.is_dir())
    held = first_few(f"{entry.name}/" if entry.is_dir() else entry.name for entry in sorted(above.iterdir()))
    return AbsentError(f"{option}: there is no {kind} {path}; {above} holds {held or 'nothing'}")


def first_few(items: Iterable[object]) -> str:
    """The first of some items, and how many more there are."""
    shown = [str(item) for item in items]
    return ", ".join(shown[:MOST_SHOWN] + [f"{len(shown) - MOST_SHOWN} more"] * (len(shown) > MOST_SHOWN))


def file_at(path: Path) -> Path:
    """`path` itself; AbsentError if there is no such file."""
    if not path.is_file():
        raise missing("file", path)
    return path


def image_files(folder: Path, option: str = "data.root") -> list[Path]:
    """The images below a folder, at any depth, sorted; one line on stderr counts files of other formats.

    Links are followed. Entries that tools leave are no part of the set.

    Raises:
        AbsentError: there is no such folder, or no image in it.
        UserError: an entry is neither file nor folder, or a folder is reached twice. Either names `option`.
    """
    if not folder.is_dir():
        raise missing("folder", folder, option)
    images: list[Path] = []
    others: list[Path] = []
    for path in walk(folder, option):
        (images if path.suffix.lower() in SUFFIXES else others).append(path)
    counted = f"{len(others)} of other formats, like {min(others)}" if others else ""
    if not images:
        raise AbsentError(f"{option}: {folder} holds no {KINDS} image" + (f", but {counted}" if counted else ""))
    if counted:
        notice(f"{option}: {len(images)} images in {folder}; passed over: {counted} (not {KINDS})")
    return sorted(images)


def walk(top: Path, option: str) -> Iterator[Path]:
    """The files below a folder; raises what `image_files` raises."""
    waiting, seen = [str(top)], set()
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)  # noqa: PTH116 - entries of scandir are text
        if (status.st_dev, status.st_ino) in seen:  # people under two names, or a circle of links
            raise UserError(f"{option}: {folder} is a link to a folder that {top} holds already")
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if of_a_tool(entry.name):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.is_file():
                    yield Path(entry.path)
                else:
                    gone = not os.path.exists(entry.path)  # noqa: PTH110 - entries of scandir are text
                    kind = "a link whose target is gone" if gone else "neither a file nor a folder"
                    raise UserError(f"{option}: {entry.path} is {kind}; mend or remove it")

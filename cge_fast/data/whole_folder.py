"""Folders that are written whole or not at all."""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cge_fast.errors import UserError

COUNT = ".files"  # in a folder that is written once: how many files its folders were written with


def cache_home() -> Path:
    """The folder of what is made once: $CGE_CACHE, or ~/.cache/cge-fast."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("CGE_CACHE", home / "cge-fast"))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to write to, which becomes `folder` at the end; after an exception nothing is left.

    Processes that write to the same place wait for each other, and remove what one that was killed has left.

    UserError if `folder` exists and is not an empty folder.
    """
    folder = folder.resolve()
    prefix = f".{folder.name}-unfinished-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        locked = False
        with suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            locked = True
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} exists already and is not an empty folder")
        for left in folder.parent.glob(f"{glob.escape(prefix)}*") if locked else ():
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
            unfinished = Path(temporary) / folder.name
            unfinished.mkdir()
            yield unfinished
            unfinished.rename(folder)
    finally:
        os.close(descriptor)


def once(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(folder)`, which writes it whole, unless it is there or another process writes it meanwhile.

    UserError if the folder has fewer files than it was written with.
    """
    try:
        if not folder.is_dir():
            write(folder)
            (folder / COUNT).write_text(str(len([*folder.glob("*/*")])))
    except (OSError, UserError):
        if not folder.is_dir():
            raise
    written = folder / COUNT
    if written.is_file():  # not so in a folder of an earlier version
        found, wanted = len([*folder.glob("*/*")]), written.read_text()
        if not wanted.isdecimal() or found < int(wanted):
            raise UserError(f"{folder} holds {found} of its {wanted} files: remove it, and it is made anew")

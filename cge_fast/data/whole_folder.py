"""Folders that are written whole or not at all."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cge_fast.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to write to, which becomes `folder` at the end; after an exception nothing is left.

    UserError if `folder` exists and is not an empty folder.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(folder)


def once(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(folder)`, which writes it whole, unless it is there or another process writes it meanwhile."""
    try:
        if not folder.is_dir():
            write(folder)
    except (OSError, UserError):
        if not folder.is_dir():
            raise

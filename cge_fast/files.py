"""Files and folders that are there whole or not at all, and the lock that keeps others out of a folder.

Nothing here needs symbolic links. A folder takes another's place by two renames; a kill between them leaves the old one
under another name, where `located` finds it and `mend` takes it from.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cge_fast.errors import UserError

UNFINISHED, PREVIOUS = ".unfinished-", ".previous-"  # prefixes of what is being written, and of what it replaces
LARGE = 100_000  # bytes; a file of settings has fewer
LOCK = ".lock"  # in a folder that is in use: host and process
COUNT = ".files"  # in a folder that was written once: how many files its folders were written with


def at_home(path: Path) -> Path:
    """The path with the home folder in the place of a leading ~, which a shell leaves in --option=~/x, and YAML has."""
    with suppress(RuntimeError):  # nobody is called so
        return path.expanduser()
    return path


def cache_home() -> Path:
    """The folder of what is made once: $CGE_CACHE, or ~/.cache/cge-fast."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("CGE_CACHE", home / "cge-fast"))


def write(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file, whole or part after part, that must not be there yet, down to the disk; an OSError names it."""
    try:
        with path.open("xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace(path: Path, content: bytes) -> None:
    """Writes a file, in the place of the one that may be there, whole or not at all."""
    unfinished = beside(path)
    try:
        write(unfinished, content)
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


def beside(path: Path, token: str = "") -> Path:
    """A name in the same folder for what is being written; `token` tells it from what others write."""
    return path.with_name(f"{UNFINISHED}{token or secrets.token_hex(4)}-{path.name}")


@contextmanager
def turn_in(folder: Path) -> Iterator[bool]:
    """Waits until no other process is inside, for this folder; gives False on a disk without locks."""
    descriptor, has_locks = os.open(folder, os.O_RDONLY), False
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            has_locks = True
        yield has_locks
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which becomes `folder` at the end; after an exception nothing is left.

    Processes that write to the same place wait for each other, and remove what one that was killed has left.

    UserError if `folder` exists and is not an empty folder.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(folder)
    with turn_in(folder.parent) as has_locks:
        name = beside(Path(glob.escape(folder.name)), "[0-9a-f]" * 8).name
        left = [*folder.parent.glob(name)] if has_locks else []  # else another process may be writing it
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} exists already and is not an empty folder")
        for path in left:
            remove(path)
        try:
            unfinished.mkdir()
            yield unfinished
            write(unfinished / COUNT, str(len([*unfinished.glob("*/*")])).encode())
            os.sync()  # all at once; to wait for each of thousands of files takes minutes
            unfinished.rename(folder)
            sync(folder.parent)
        finally:
            remove(unfinished)


def once(folder: Path, make: Callable[[Path], None]) -> None:
    """Calls `make(folder)`, which makes a `new_folder`, unless it is there or another process makes it meanwhile.

    UserError if the folder has fewer files than it was written with.
    """
    try:
        if not folder.is_dir():
            make(folder)
    except (OSError, UserError):
        if not folder.is_dir():
            raise
    written = folder / COUNT
    if written.is_file():  # not so in a folder of an earlier version
        found, wanted = len([*folder.glob("*/*")]), written.read_text()
        if not wanted.isdecimal() or found < int(wanted):
            raise UserError(f"{folder} holds {found} of its {wanted} files: remove it, and it is made anew")


def replace_folder(folder: Path, unfinished: Path) -> None:
    """Renames the folder `unfinished` beside it to `folder`, in the place of the one that may be there."""
    sync(unfinished)
    if os.path.lexists(folder):
        folder.rename(folder.with_name(PREVIOUS + folder.name))
    unfinished.rename(folder)
    sync(folder.parent)


def located(folder: Path) -> Path:
    """Where a folder is that `replace_folder` writes: under its name, but for a moment, or after a kill in it."""
    previous = folder.with_name(PREVIOUS + folder.name)
    return previous if previous.exists() and not folder.exists() else folder


def mend(parent: Path) -> None:
    """Undoes or completes what `replace_folder` left half done below `parent`, and removes what was being written."""
    for previous in parent.glob(PREVIOUS + "*"):
        folder = parent / previous.name.removeprefix(PREVIOUS)
        remove(previous) if folder.exists() else previous.rename(folder)
    for unfinished in parent.glob(UNFINISHED + "*"):
        remove(unfinished)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def copy_folder(source: Path, target: Path) -> None:
    """Makes a second folder of the same files; large ones, which nobody changes, are linked if the disk has links."""
    target.mkdir()
    for path in source.iterdir():
        copy = target / path.name
        if path.is_dir():
            copy_folder(path, copy)
            continue
        with suppress(OSError):
            if path.stat().st_size >= LARGE:
                os.link(path, copy)
        if not copy.exists():
            write(copy, path.read_bytes())


def sync(folder: Path) -> None:
    """Returns when what was made, renamed or removed in a folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds as JSON; UserError if it is damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it must hold a JSON object ({error})") from error


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_intact(path: Path) -> None:
    """Raises ValueError if a zip, as torch.save writes it, is not what its checksums say; other files pass."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of its part {damaged} is wrong")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process gets this lock on the folder.

    On one machine the system holds the lock, and drops it when the process ends, however it ends. Other machines may
    not see that, so a lock file that names another one counts until somebody removes it.

    Raises:
        UserError: another process has the lock.
    """
    path, boot = folder / LOCK, Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with path.open("a+", errors="replace") as file:
        file.seek(0)
        host, process, other_boot = (file.read().split() + [""] * 3)[:3]
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no child process inherits, as it does flock's
            here = host in ("", socket.gethostname()) or other_boot == boot
            free = here and path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except OSError as error:  # on a disk without locks the file alone counts
            free = error.errno not in (errno.EACCES, errno.EAGAIN) and not host
        if not free:
            by = f"process {process} on {host}" if host else "another process"
            raise UserError(f"output: {folder} is in use by {by}; if that has ended, remove {path}")
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()} {boot}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

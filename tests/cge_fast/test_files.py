"""Folders that are written once, whole, and files that are replaced."""

import errno
import subprocess
import sys
import threading

import pytest

from cge_fast import files
from cge_fast.errors import UserError
from cge_fast.files import new_folder, once


def write(folder):
    with new_folder(folder) as unfinished:
        (unfinished / "split").mkdir()
        for name in "abc":
            (unfinished / "split" / name).touch()


def test_a_folder_is_written_once(tmp_path):
    once(tmp_path / "set", write)
    once(tmp_path / "set", lambda folder: pytest.fail("it is there already"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".files", "a", "b", "c", "set", "split"]


def test_a_folder_that_another_process_wrote_meanwhile_will_do(tmp_path):
    def overtaken(folder):
        write(folder)
        write(folder)

    once(tmp_path / "set", overtaken)
    assert (tmp_path / "set" / "split").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    def fails(folder):
        raise UserError("the archive is damaged")

    with pytest.raises(UserError, match="the archive is damaged"):
        once(tmp_path / "set", fails)


def test_a_folder_that_lost_files_is_named(tmp_path):
    once(tmp_path / "set", write)
    (tmp_path / "set" / "split" / "more").touch()
    once(tmp_path / "set", write)
    for name in ("more", "b"):
        (tmp_path / "set" / "split" / name).unlink()
    with pytest.raises(UserError, match="set holds 2 of its 3 files: remove it, and it is made anew"):
        once(tmp_path / "set", write)


def test_a_folder_of_an_earlier_version_does_not_say_how_many_files_it_had(tmp_path):
    write(tmp_path / "set")
    once(tmp_path / "set", lambda folder: pytest.fail("it is there already"))


KILLED = """
import os, pathlib, signal, sys
from cge_fast.files import new_folder
with new_folder(pathlib.Path(sys.argv[1])) as unfinished:
    (unfinished / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    for name in ("set", "my-set"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    write(tmp_path / "set")
    of_the_other = [name for name in left if name.endswith("-my-set")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*of_the_other, "set"]


def test_the_count_of_files_is_there_as_soon_as_the_folder_is(tmp_path, monkeypatch):
    """Else one that a kill left without it would never be checked."""
    monkeypatch.setattr("cge_fast.files.sync", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set")
    assert (tmp_path / "set" / ".files").read_text() == "3"


def test_after_an_error_nothing_is_left(tmp_path):
    def fails():
        with new_folder(tmp_path / "set") as unfinished:
            (unfinished / "half").touch()
            raise UserError("the archive is damaged")

    with pytest.raises(UserError):
        fails()
    assert [*tmp_path.iterdir()] == []


def test_processes_wait_for_each_other_and_do_not_remove_what_is_being_written(tmp_path):
    ended = []

    def second():
        with pytest.raises(UserError, match="exists already"):
            write(tmp_path / "set")
        ended.append("second")

    with new_folder(tmp_path / "set") as unfinished:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        assert unfinished.is_dir()
        ended.append("first")
        (unfinished / "x").touch()
    thread.join(10)
    assert ended == ["first", "second"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    files.replace(tmp_path / "a.csv", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.csv"):
        files.replace(tmp_path / "a.csv", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == b"old"

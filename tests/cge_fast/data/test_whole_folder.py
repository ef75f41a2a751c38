"""Folders that are written once, whole."""

import pytest

from cge_fast.data.whole_folder import once, whole_folder
from cge_fast.errors import UserError


def write(folder):
    with whole_folder(folder) as unfinished:
        (unfinished / "mine").touch()


def test_a_folder_is_written_once(tmp_path):
    once(tmp_path / "set", write)
    once(tmp_path / "set", lambda folder: pytest.fail("it is there already"))
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "mine"]


def test_a_folder_that_another_process_wrote_meanwhile_will_do(tmp_path):
    def overtaken(folder):
        write(folder)
        write(folder)

    once(tmp_path / "set", overtaken)
    assert (tmp_path / "set" / "mine").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    def fails(folder):
        raise UserError("the archive is damaged")

    with pytest.raises(UserError, match="the archive is damaged"):
        once(tmp_path / "set", fails)

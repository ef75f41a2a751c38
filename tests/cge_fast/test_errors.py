"""How programs end."""

from pathlib import Path

import pytest

from cge_fast.errors import UserError, notice, one_line, run


def ending(error, capsys) -> tuple[int, str]:
    """Exit status and stderr of a program that raises `error`."""

    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        run(main, "program")
    return exit_.value.code, capsys.readouterr().err


def test_wrong_input_is_one_line_and_status_2(capsys):
    assert ending(UserError("data.root: there\n  is none"), capsys) == (2, "program: error: data.root: there is none\n")


def test_a_file_that_cannot_be_written_is_named(capsys):
    with pytest.raises(OSError, match="Not a directory") as caught:
        Path("/dev/null/x").write_text("")
    assert ending(caught.value, capsys) == (2, "program: error: /dev/null/x: Not a directory\n")


def test_ctrl_c_is_no_traceback(capsys):
    assert ending(KeyboardInterrupt(), capsys) == (130, "program: interrupted by SIGINT\n")


@pytest.mark.parametrize("defect", [ZeroDivisionError("x"), OSError("no file is meant")])
def test_a_defect_of_the_program_keeps_its_traceback(defect):
    def main():
        raise defect

    with pytest.raises(type(defect)):
        run(main, "program")


def test_a_workers_traceback_is_left_out():
    wrapped = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ..."
    )
    assert one_line(UserError(wrapped + "\ncge_fast.errors.UserError: image x: broken\n")) == "image x: broken"


def test_names_of_files_cannot_steer_the_terminal(capsys):
    def main():
        notice("a\x1b[2Jb\n.jpg")
        raise UserError("image \x1b]0;x\x07\u202egpj.\udcff cannot be read")

    with pytest.raises(SystemExit):
        run(main, "program")
    escaped = r"image \x1b]0;x\x07\u202egpj.\udcff cannot be read"
    assert capsys.readouterr().err.splitlines() == [r"a\x1b[2Jb\n.jpg", f"program: error: {escaped}"]
    error = FileNotFoundError(2, "No such file or directory", "\x1b[31mred")
    with pytest.raises(SystemExit):
        run(lambda: (_ for _ in ()).throw(error), "program")
    assert capsys.readouterr().err == "program: error: \\x1b[31mred: No such file or directory\n"


def test_of_several_ranks_the_first_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    notice("seen by nobody")
    assert capsys.readouterr().err == ""

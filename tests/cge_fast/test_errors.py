"""How programs end."""

import multiprocessing
import signal
import time
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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "a process that loads images has died",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"),
            "/dev/shm is full: set --data.workers",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "/dev/shm is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (ConnectionResetError(104, "Connection reset by peer"), "a process that loads images has died"),
        (EOFError(), "a process that loads images has died"),
        (RuntimeError("[gloo/pair.cc:545] Read error: Connection reset by peer"), "another rank has ended"),
    ],
)
def test_what_torch_and_the_system_lack_is_one_line_with_its_notes(error, message, capsys):
    error.add_note("the last checkpoint is x")
    status, err = ending(error, capsys)
    assert status == 2
    assert err.startswith(f"program: error: {message}")
    assert err.endswith("; the last checkpoint is x\n")


def test_names_with_escape_codes_do_not_reach_the_terminal(capsys):
    assert ending(UserError("image \x1b]0;x\x07\u202e\udcff"), capsys)[1] == (
        "program: error: image \\x1b]0;x\\x07\\u202e\\udcff\n"
    )


@pytest.fixture
def heard(number):
    """A program that is started by nohup, say, inherits that it ignores a signal."""
    inherited = signal.signal(number, signal.SIG_DFL)
    yield
    signal.signal(number, inherited)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_its_status_whatever_it_raises_on_the_way(number, capsys):
    def main():
        try:
            signal.raise_signal(number)
        finally:
            raise RuntimeError("a destructor's")

    with pytest.raises(SystemExit) as exit_:
        run(main, "program")
    assert exit_.value.code == 128 + number
    assert capsys.readouterr().err == f"program: interrupted by {number.name}\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_a_destructor_swallows_is_repeated(capsys):
    class Destroyed:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def main():
        Destroyed()
        time.sleep(10)

    with pytest.raises(SystemExit) as exit_:
        run(main, "program")
    assert exit_.value.code == 143


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
    monkeypatch.setenv("WORLD_SIZE", "2")
    notice("seen by nobody")
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("WORLD_SIZE")
    notice("this process is alone, whatever else set its RANK")
    assert "alone" in capsys.readouterr().err


def test_inside_processes_are_forked_and_outside_as_before(capsys):
    """Those that load images get their handlers of signals so; Python 3.14 starts them in another way by itself."""
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        run(lambda: print(multiprocessing.get_start_method()), "program")
        assert capsys.readouterr().out == "fork\n"
        assert multiprocessing.get_start_method() == "forkserver"
    finally:
        multiprocessing.set_start_method(None, force=True)

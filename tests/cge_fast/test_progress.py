"""Bars on a terminal, lines elsewhere."""

import io

import pytest

from cge_fast import progress as module
from cge_fast.log import epoch_line
from cge_fast.progress import progress, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module.LINES, "last", 0.0)
    return clock


def test_where_nobody_watches_a_bar_is_a_line_now_and_then(capsys, clock):
    for _ in progress(range(100), what="ranking", unit="queries", mininterval=0):
        clock.now += 1
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 3 + 1
    assert lines[-1] == ""
    assert lines[0].startswith("ranking: 30 of 100 queries, ")
    assert "\r" not in "".join(lines)


@pytest.mark.usefixtures("clock")
def test_what_takes_a_moment_leaves_no_line(capsys):
    for _ in progress(range(100), what="ranking", unit="queries", mininterval=0):
        pass
    assert capsys.readouterr().err == ""


def test_a_line_that_is_said_puts_the_next_off(capsys, clock):
    with progress(what="training", unit="steps", total=4, mininterval=0) as bar:
        clock.now = 29
        say("epoch 1")
        clock.now = 58
        bar.update()
        clock.now = 59
        bar.update()
    assert [line[:14] for line in capsys.readouterr().err.splitlines()] == ["epoch 1", "training: 2 of"]


def test_on_a_terminal_a_bar_says_what_is_done_and_vanishes(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    for _ in progress(range(3), what="ranking", unit="queries", mininterval=0):
        say("a line")
    drawn = screen.getvalue()
    assert "\rranking: " in drawn
    assert " queries/s" in drawn
    assert drawn.count("a line\n") == 3
    assert drawn.endswith("\r")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_rank_that_shows_nothing_writes_nothing(monkeypatch, is_terminal):
    screen = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    assert [*progress(range(3), what="ranking", unit="queries", show=False)] == [0, 1, 2]
    assert screen.getvalue() == ""


def test_an_epoch_is_a_line():
    row = {"epoch": 3, "loss": 4.5214, "train_accuracy": 0.125, "lr": 0.00035, "seconds": 12.34, "mAP": None}
    assert epoch_line(row, 120) == "epoch   3/120: loss 4.521, accuracy 12.5%, rate 0.00035, 12.3 s"
    assert epoch_line(row | {"mAP": 0.5, "rank1": 0.75}, 9) == (
        "epoch 3/9: loss 4.521, accuracy 12.5%, rate 0.00035, 12.3 s; mAP 50.0%, rank-1 75.0%"
    )

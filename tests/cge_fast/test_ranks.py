"""Processes under torchrun: how they start, and that none outlives the others."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
from runs import rows
from support import WITHOUT_GPU, on_ranks

from cge_fast import files, train
from cge_fast.options import TrainConfig
from cge_fast.report import REPORT

START = [sys.executable, "-m", "cge_fast.torchrun", "--standalone", "--nproc-per-node", "2", "-m", "cge_fast.train"]


def started(arguments) -> subprocess.Popen:
    """A training on two ranks, in a session of its own."""
    environment = os.environ | WITHOUT_GPU | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*START, *arguments], env=environment, start_new_session=True, **pipes)


def in_session(session: int) -> list[str]:
    done = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True)
    return done.stdout.split()


def training(options, tmp_path) -> subprocess.Popen:
    """One that goes on for ever, in its second epoch or later."""
    process = started([*options, "--optim.epochs", "1000", "--evaluation.every", "0"])
    while process.poll() is None and not (tmp_path / "run" / "checkpoints" / "last").exists():
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    return process


def assert_ended(process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while left := in_session(process.pid):
        assert time.monotonic() < end, f"{left} outlive torchrun"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_ranks_of_a_torchrun_that_was_killed_end(options, tmp_path):
    process = training(options, tmp_path)
    process.kill()
    _, printed = process.communicate(timeout=60)  # the ranks have its pipes too
    assert_ended(process)
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / files.LOCK).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_is_one_line_and_its_status(number, options, tmp_path):
    process = training(options, tmp_path)
    os.killpg(process.pid, number)
    _, printed = process.communicate(timeout=60)
    assert_ended(process)
    assert process.returncode == 128 + number
    assert printed.count(f"interrupted by {number.name}; the last checkpoint is") == 1
    assert "Traceback" not in printed
    assert rows(tmp_path / "run")[-1]["epoch"] >= 1


@pytest.mark.slow
def test_the_page_has_what_that_of_one_process_has(options, tmp_path, shared_run):
    process = started(options)
    printed, said = process.communicate(timeout=120)
    assert (process.returncode, len(printed.splitlines())) == (0, 1), said
    headings = [re.findall("<h2>(.*?)</h2>", (run / REPORT).read_text()) for run in (tmp_path / "run", shared_run)]
    assert headings[0] == headings[1]
    assert said.count(REPORT) == 1


@pytest.mark.slow
def test_what_is_wrong_is_said_once(options, tmp_path):
    process = started([*options, "--data.root", str(tmp_path / "gone")])
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2
    assert printed.count("data.root: there is no folder") == 1
    assert "Traceback" not in printed


def claim(rank, folder):
    class Clock(datetime):
        """Each rank's is a second later than that of the one before."""

        @classmethod
        def now(cls):
            return datetime(2026, 1, 1, 12, 0, rank)

    os.chdir(folder)
    train.datetime = Clock
    config = TrainConfig()
    with train.claimed(config, resuming=False):
        assert config.output == Path("runs") / "20260101-120000"


def test_ranks_whose_clocks_differ_have_one_folder(tmp_path):
    on_ranks(2, claim, tmp_path, folder=tmp_path)
    with suppress(FileNotFoundError):
        assert [*(tmp_path / "runs").iterdir()] == [], "where nothing was written nothing is left"

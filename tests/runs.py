"""Runs of the training program in tests, and what they leave behind."""

import json
from pathlib import Path

import pytest
import torch

from cge_fast import checkpoint, errors, loop, train


def run(arguments, capsys) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program."""
    status = 0
    try:
        errors.run(lambda: train.main(arguments), "cge_fast.train")
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(main, program: str, arguments, capsys) -> str:
    """The one line that a wrong call of a program ends with, with status 2."""
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: main(arguments), program)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    return error


def killed_in_epoch(epoch: int, arguments, monkeypatch) -> None:
    """A run that ends before its epoch's checkpoint is written."""
    save = loop.save

    def save_or_die(run, is_best):
        if run.epochs_done == epoch:
            raise KeyboardInterrupt
        save(run, is_best)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "save", save_or_die)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / "last"
    return checkpoint.load_model(last) | checkpoint.load_loss(last)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name

"""Checkpoints of untrained networks, whose weights a test sets as it needs them."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from cge_fast.analyze.trained import Trained, open_checkpoint
from cge_fast.build import Run, build_run
from cge_fast.data import read
from cge_fast.data.batches import plain_batches, train_labels
from cge_fast.experiments.variants import VARIANTS
from cge_fast.loop import save as save_run
from cge_fast.train import parse


def unchanged(run: Run) -> None:
    """As it was initialised."""


@pytest.fixture(autouse=True)
def on_the_cpu(without_gpu):
    """Where what analyses find is computed anew."""


@pytest.fixture
def market(shared_market):
    return shared_market


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The folder of all runs, and the checkpoints that are there."""
    return tmp_path_factory.mktemp("runs"), {}


@pytest.fixture
def saved(options, checkpoints):
    """Writes a checkpoint of a run called `name` after `change(run)`, once in a session, and says where it is.

    24 training images, in batches of 7.
    """
    runs, there = checkpoints

    def save(name, *settings, change=unchanged) -> Path:
        key = name, settings, change
        if key not in there:
            output = runs / str(len(there)) / name
            config, _, _ = parse([*options, "--evaluation.batch", "7", "--output", str(output), *settings])
            run = build_run(config, torch.device("cpu"), VARIANTS)
            with torch.no_grad():
                change(run)
            save_run(run, is_best=False)
            there[key] = output / "checkpoints" / "last"
        return there[key]

    return save


@pytest.fixture
def opened(saved):
    """The same, opened."""
    return lambda *arguments, **keywords: open_checkpoint(saved(*arguments, **keywords))


def random_memory(run: Run) -> None:
    """Unit rows near the mean of all features, but for the last class, which was never seen."""
    memory = run.criterion.classification.memory
    memory.copy_(normalize(torch.rand(memory.shape, generator=torch.Generator().manual_seed(0)), dim=2))
    memory[:, -1] = 0


@pytest.fixture
def with_memory():
    return random_memory


@pytest.fixture
def train_set():
    """All training images of a checkpoint's data set in one batch, and their labels."""

    def images_and_labels(trained: Trained) -> tuple[torch.Tensor, torch.Tensor]:
        images = read(trained.config.data).train
        return next(plain_batches(images, len(images), trained.config.data, trained.device, "all")), torch.tensor(
            train_labels(images)
        )

    return images_and_labels


@pytest.fixture
def rows_of():
    """The rows of a CSV."""

    def read_rows(file: Path) -> list[dict[str, str]]:
        with file.open(newline="") as opened:
            return list(csv.DictReader(opened))

    return read_rows

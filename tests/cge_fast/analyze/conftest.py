"""Checkpoints of untrained networks, whose weights a test sets as it needs them."""

import csv
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from cge_fast.analyze.trained import Trained, open_checkpoint
from cge_fast.data import read
from cge_fast.data.batches import test_loader as loader_of
from cge_fast.data.batches import train_labels
from cge_fast.loop import Training
from cge_fast.train import parse


@pytest.fixture
def saved(options, tmp_path):
    """Writes a checkpoint of a run called `name` after `change(network)`, and says where it is.

    24 training images, in batches of 7.
    """

    def save(name, *settings, change=lambda network: None) -> Path:
        output = tmp_path / "runs" / name
        config, _, _ = parse([*options, "--evaluation.batch", "7", "--output", str(output), *settings])
        training = Training(config, torch.device("cpu"))
        with torch.no_grad():
            change(training.network)
        training.save(is_best=False)
        return output / "checkpoints" / "last"

    return save


@pytest.fixture
def opened(saved):
    """The same, opened."""
    return lambda *arguments, **keywords: open_checkpoint(saved(*arguments, **keywords))


def random_memory(network) -> None:
    """Unit rows near the mean of all features, but for the last class, which was never seen."""
    random = torch.Generator().manual_seed(0)
    network.head.memory.copy_(normalize(torch.rand(network.head.memory.shape, generator=random), dim=2))
    network.head.memory[:, -1] = 0


@pytest.fixture
def with_memory():
    return random_memory


@pytest.fixture
def train_set():
    """All training images of a checkpoint's data set in one batch, and their labels."""

    def images_and_labels(trained: Trained) -> tuple[torch.Tensor, torch.Tensor]:
        images = read(trained.config.data).train
        return next(iter(loader_of(images, len(images), trained.config.data))), torch.tensor(train_labels(images))

    return images_and_labels


@pytest.fixture
def rows_of():
    """The rows of a CSV."""

    def read_rows(file: Path) -> list[dict[str, str]]:
        with file.open(newline="") as opened:
            return list(csv.DictReader(opened))

    return read_rows

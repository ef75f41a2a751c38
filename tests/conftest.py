"""A tiny Market-1501 folder that a network can learn, and the options to train on it in a second."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

if not torch.cuda.is_available():  # read when cge_kernels is imported: kernels can be tested in the interpreter only
    os.environ.setdefault("TRITON_INTERPRET", "1")

IDENTITIES, IMAGES = 4, 6


def write_market1501(root: Path) -> Path:
    """Four training and four test identities, each a colour; six images each, from three cameras."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, size=(2 * IDENTITIES, 3))
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir(parents=True)
    for identity, colour in enumerate(colours, start=1):
        for number in range(IMAGES):
            camera = number % 3 + 1
            pixels = np.clip(colour + random.normal(0, 20, size=(24, 16, 3)), 0, 255).astype(np.uint8)
            split = "bounding_box_train"
            if identity > IDENTITIES:
                split = "query" if number == 0 else "bounding_box_test"
            PIL.Image.fromarray(pixels).save(root / split / f"{identity:04d}_c{camera}s1_{number:06d}_01.png")
    return root


@pytest.fixture
def market(tmp_path) -> Path:
    return write_market1501(tmp_path / "market")


@pytest.fixture(scope="session")
def shared_market(tmp_path_factory) -> Path:
    """The same for tests that change nothing in it."""
    return write_market1501(tmp_path_factory.mktemp("shared") / "market")


@pytest.fixture
def options(market, tmp_path) -> list[str]:
    """Command line of a training of two epochs of three steps."""
    return [
        *("--data.name", "market1501", "--data.root", str(market), "--data.height", "24", "--data.width", "16"),
        *("--data.identities", "4", "--data.instances", "2", "--data.workers", "0", "--data.pad", "2"),
        *("--optim.epochs", "2", "--optim.precision", "float32", "--evaluation.batch", "8"),
        *("--output", str(tmp_path / "run")),
    ]

"""A tiny Market-1501 folder that a network can learn, options to train on it in a second, and a run trained so."""

import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from support import repeatable, write_crops

if not torch.cuda.is_available():  # read when cge_kernels is imported: kernels can be tested in the interpreter only
    os.environ.setdefault("TRITON_INTERPRET", "1")
# read with the first matmul on a GPU: only so is cuBLAS before torch 2.11 deterministic, where a test wants that
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.backends.cudnn.allow_tf32 = False  # so that a GPU's features are the CPU's, but for roundings of float32

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


def small_options(market: Path, output: Path) -> list[str]:
    """Command line of a training of two epochs of three steps."""
    return [
        *("--data.name", "market1501", "--data.root", str(market), "--data.height", "24", "--data.width", "16"),
        *("--data.identities", "4", "--data.instances", "2", "--data.workers", "0", "--data.pad", "2"),
        *("--optim.epochs", "2", "--optim.precision", "float32", "--evaluation.batch", "8"),
        *("--output", str(output)),
    ]


@pytest.fixture
def same_bits():
    """A test whose trainings must have the same bits."""
    with repeatable():
        yield


@pytest.fixture
def without_gpu(monkeypatch):
    """A test whose programs run on the CPU, as where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def market(tmp_path) -> Path:
    return write_market1501(tmp_path / "market")


@pytest.fixture(scope="session")
def shared_market(tmp_path_factory) -> Path:
    """The same folder; not to be changed."""
    return write_market1501(tmp_path_factory.mktemp("shared") / "market")


@pytest.fixture(scope="session")
def shared_crops(shared_market) -> Path:
    """The same as a `folder` set; not to be changed."""
    return write_crops(shared_market, shared_market.with_name("crops"))


@pytest.fixture
def options(market, tmp_path) -> list[str]:
    return small_options(market, tmp_path / "run")


@pytest.fixture(scope="session")
def shared_run(shared_market) -> Path:
    """The folder of a run of the options; not to be changed."""
    from cge_fast import train

    with repeatable():
        train.main(small_options(shared_market, shared_market.with_name("run")))
    return shared_market.with_name("run")


@pytest.fixture
def trained(shared_run, market, tmp_path) -> Path:
    """A copy of that run, in the folder that `options` name."""
    run = tmp_path / "run"
    shutil.copytree(shared_run, run, symlinks=True)
    for settings in (run / "config.yaml", *run.glob("checkpoints/*/config.yaml")):
        settings.write_text(settings.read_text().replace(str(shared_run.parent), str(tmp_path)))
    return run

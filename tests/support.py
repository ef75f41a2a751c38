"""Where the kernels' tests run, arguments of the operators, and processes that are ranks of a group.

With a GPU the kernels run on it, compiled; without one, in Triton's interpreter on the CPU.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.functional import normalize

GPU = torch.cuda.is_available()
KERNEL_DEVICE = "cuda" if GPU else "cpu"
# Environment of processes that are to run as without a GPU: ranks, which have one GPU at most, or what is compared with
# figures of the CPU.
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


class Sample(NamedTuple):
    """Arguments of every operator, float32 on the kernels' device; of the memory's classes the first was never seen."""

    feature_map: torch.Tensor
    logits: torch.Tensor
    features: torch.Tensor
    weight: torch.Tensor
    local_features: torch.Tensor
    memory: torch.Tensor
    labels: torch.Tensor


def draw_sample(batch=3, stripes=2, classes=7, channels=5, height=5, width=2, feature_channels=None, seed=0) -> Sample:
    """Draws them; feature_channels: of the features and the classifier, as many as channels if None."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    memory = normalize(draw(stripes, classes, channels), dim=2)
    memory[:, 0] = 0
    feature_channels = feature_channels or channels
    sample = Sample(
        feature_map=draw(batch, channels, height, width),
        logits=3 * draw(batch, classes),
        features=draw(batch, feature_channels),
        weight=draw(classes, feature_channels),
        local_features=draw(batch, stripes, channels),
        memory=memory,
        labels=torch.randint(classes, (batch,), generator=random),
    )
    return Sample(*(tensor.to(KERNEL_DEVICE) for tensor in sample))


def write_crops(market: Path, root: Path) -> Path:
    """A set in Market-1501's format as one of the format `folder`, with text for names: train/0001/c1_000000.png."""
    folders = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
    for source, split in folders.items():
        for image in (market / source).glob("*.png"):
            identity, camera, number, _ = image.stem.split("_")
            target = root / split / identity / f"{camera[:2]}_{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(image.read_bytes())
    return root


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, trainings in this process have the same bits from run to run also on a GPU.

    There cuDNN and index_add_ may add up in any order otherwise; what cuDNN has once found to be fast it keeps.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(GPU or before[0], warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


RANKS_TIMEOUT = 60  # seconds that a rank waits for the others


def on_ranks(ranks: int, function, *arguments, folder: Path, join: bool = True):
    """Runs function(rank, *arguments) in so many gloo processes without a GPU, which meet in a file of the folder."""
    arguments = ranks, function, arguments, str(folder)
    with forked():
        return processes.start_processes(start_rank, arguments, nprocs=ranks, join=join, start_method="forkserver")


@contextmanager
def forked() -> Iterator[None]:
    """Inside, processes that are started by forkserver have our packages and see no GPU.

    They are forked from a process that has imported what this one has of them when the first is started, since to
    import them takes each longer than most tests, and that has the environment of that moment.
    """
    ours = [name for name in sys.modules if name.partition(".")[0] in ("cge_fast", "cge_kernels", "cge_reference")]
    multiprocessing.set_forkserver_preload(ours)
    with patch.dict(os.environ, WITHOUT_GPU):
        yield


def start_rank(rank, ranks, function, arguments, folder):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=RANKS_TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    function(rank, *arguments)
    dist.destroy_process_group()

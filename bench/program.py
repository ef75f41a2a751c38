"""The whole program from disk to gradient, beside what it would be without this project's parts. Contenders take turns.

- step: images per second of training steps of ResNet-18 with decoded images kept in memory, the kernels and the
  device's precision, also compiled, or in float32; beside the same program with the plain reference, in float32, and
  none of it. Images are loaded within the step.
- loader: images per second until batches are augmented, float and on the device, beside a plain torchvision dataset
  with the same transforms and as many workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.measure import Instant, default_device, take_turns
from bench.results import Figure
from bench.step import endless
from cge_fast import data
from cge_fast.build import Run, build_run, chosen_backend
from cge_fast.data.augment import ERASED_ASPECT, SMALLEST_ERASED_AREA, Augment, mean_and_std
from cge_fast.data.batches import train_labels, train_loader
from cge_fast.data.sampler import PKSampler
from cge_fast.metrics import EpochMetrics
from cge_fast.options import DataConfig, ModelConfig, OptimConfig, TrainConfig
from cge_fast.step import training_step

PARTS = ["step", "loader"]
BACKBONE = "resnet18"
STEP = DataConfig(height=128, width=64, identities=16, instances=4, workers=0)
LOADER = DataConfig(height=384, width=128, identities=16, instances=4, workers=2, pad=10)
BATCHES = 12  # of a turn of the loader


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench program`."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    parser.add_argument("--rounds", type=PositiveInt, default=9, help="turns of each contender")


def measure(parts: list[str], rounds: int) -> Iterator[Figure]:
    """Images per second of the parts; writes no run."""
    if "step" in parts:
        place = f"{BACKBONE}, {STEP.height}x{STEP.width}, B {STEP.identities * STEP.instances}", "images"
        with TemporaryDirectory() as folder:
            runs = {}
            for contender, config in programs().items():
                config.model, config.output = ModelConfig(BACKBONE), Path(folder)
                run = build_run(config, default_device())
                runs[contender] = partial(timed_step, run, endless(run))
            yield from compared("program, step", *place, runs, rounds)
    for cache in ("none", "ram") if "loader" in parts else ():
        config = replace(LOADER, cache=cache)
        place = f"{LOADER.height}x{LOADER.width}, {LOADER.workers} workers", f"data.cache {cache}"
        yield from compared("program, loader", *place, loaders(config, default_device()), rounds)


def programs() -> dict[str, TrainConfig]:
    """This program, also compiled and in float32, and what it would be without its parts."""
    kept = replace(STEP, cache="ram")
    return {
        "cge_fast": TrainConfig(kept),
        "cge_fast, compiled": TrainConfig(kept, optim=OptimConfig(compile=True)),
        "cge_fast, float32": TrainConfig(kept, optim=OptimConfig(precision="float32")),
        "reference": TrainConfig(STEP, optim=OptimConfig(precision="float32"), backend="reference"),
    }


def compared(bench: str, setting: str, subject: str, runs: dict[str, Any], rounds: int) -> Iterator[Figure]:
    """Images per second of each run."""
    for contender, found in take_turns(runs, rounds).items():
        yield Figure.median(bench, setting, subject, contender, "images", "images/s", samples=found["images"])


def timed_step(run: Run, batches: Iterator[tuple[Tensor, ...]]) -> dict[str, float]:
    """Images per second of one step, from the batch's files to the memory's write."""
    metrics, start = EpochMetrics(run.criterion.weights, run.config.model.stripes, run.device), Instant(run.device)
    pixels, drawn, labels = (tensor.to(run.device, non_blocking=True) for tensor in next(batches))
    with chosen_backend(run.config.backend):
        training_step(run, run.augment(pixels, drawn), labels, momentum=0.5, metrics=metrics)
    return {"images": len(labels) / (Instant(run.device) - start)}


def loaders(config: DataConfig, device: torch.device) -> dict[str, Any]:
    """An epoch of the same batches of our loader, and of a plain one."""
    images, augment = data.read(config, ["train"]).train, Augment(config).to(device)
    labels, pinned = train_labels(images), device.type == "cuda"
    drawn: Any = list(islice(PKSampler(labels, config.identities, config.instances), BATCHES))
    options = {"num_workers": config.workers, "persistent_workers": config.workers > 0, "pin_memory": pinned}
    batches = [[index for index, _ in batch] for batch in drawn]
    plain = DataLoader(Pictures(images, labels, config), batch_sampler=batches, **options)
    both = {"cge_fast": train_loader(images, drawn, config, pinned), "torchvision": plain}
    return {contender: partial(timed_epoch, loader, device, augment) for contender, loader in both.items()}


def timed_epoch(loader: DataLoader, device: torch.device, augment: Augment) -> dict[str, float]:
    """Images per second of an epoch; `augment` is for batches that are still uint8."""
    start, images = Instant(device), 0
    for batch in loader:
        pixels, *rest = (tensor.to(device, non_blocking=True) for tensor in batch)
        images += len(augment(pixels, rest[0]) if pixels.dtype == torch.uint8 else pixels)
    return {"images": images / (Instant(device) - start)}


class Pictures(Dataset):
    """Augmented images and labels, one by one, by the transforms that BagTricks' code takes from torchvision."""

    def __init__(self, images: Sequence[data.Image], labels: Sequence[int], config: DataConfig):
        size, area = (config.height, config.width), (SMALLEST_ERASED_AREA, config.erasing_area)
        steps = [transforms.Resize(size), transforms.RandomHorizontalFlip(config.flip), transforms.Pad(config.pad)]
        steps += [transforms.RandomCrop(size), transforms.ToTensor(), transforms.Normalize(*mean_and_std(config))]
        self.transform = transforms.Compose([*steps, transforms.RandomErasing(config.erasing, area, ERASED_ASPECT)])
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(PIL.Image.open(self.images[index].path).convert("RGB")), self.labels[index]

"""Images/s of the whole training step, plain reference operators against fused kernels: python -m bench.train_step

Both trainings start from the same random weights, on the embedded data set and with average pooling. They take a step
each in turn, after one that does not count, so that whatever else the machine does falls on both, and both take their
batches from one loader. The head's share is that of forward and losses, backward and memory write. A figure whose steps
spread by more than 20% (80th less 20th percentile, over the median) is marked with ~.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor
from tqdm import tqdm

from bench.tables import table
from cge_fast import errors
from cge_fast.backbones.build import Backbone
from cge_fast.loop import EpochSums, Training
from cge_fast.options import DataConfig, ModelConfig, TrainConfig

PROGRAM = "bench.train_step"
KERNELS = REFERENCE, FUSED = "reference", "fused"
INSTANCES = 4  # images of each identity in a batch
HEAD = ("head forward and losses", "head backward", "memory write")
WAITING = "waiting for data"
MOST_SPREAD = 0.2  # of a figure that is not marked


@dataclass(frozen=True)
class Setting:
    """A backbone, the size of its images in pixels, and the identities in a batch."""

    backbone: Backbone
    height: int
    width: int
    identities: int


# On two CPU cores a step of ResNet-50 with 64 images takes half a minute, so its batch is smaller.
SETTINGS = {
    "resnet18": Setting("resnet18", height=128, width=64, identities=16),
    "resnet50": Setting("resnet50", height=384, width=128, identities=4),
}


@dataclass(frozen=True)
class Row:
    """What was measured of one setting with one set of operators.

    Args:
        setting: its name.
        kernels: the operators, as `TrainConfig.kernels` names them.
        batch: images in a step.
        parts: milliseconds of each part in each step, by the name of the stopwatch's lap.
    """

    setting: str
    kernels: str
    batch: int
    parts: dict[str, list[float]]

    def milliseconds(self, *parts: str) -> list[float]:
        """Of these parts together in each step; without names, of the whole step."""
        return [sum(step) for step in zip(*(self.parts[part] for part in parts or self.parts), strict=True)]

    def share(self, *parts: str) -> float:
        """The sum of these parts' medians over that of all parts, between 0 and 1."""
        medians = {part: np.median(values) for part, values in self.parts.items()}
        return sum(medians[part] for part in parts) / sum(medians.values())

    def images_per_second(self) -> float:
        """By the median step."""
        return 1e3 * self.batch / np.median(self.milliseconds())


def endless(training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the training's loader, epoch after epoch."""
    for epoch in count(1):
        training.sampler.epoch = epoch
        yield from training.loader


def timed_step(training: Training, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Milliseconds of each part of one step, the waiting for its batch included."""
    sums = EpochSums.zeros(training.network.head.stripes, training.device)
    training.stopwatch.seconds.clear()
    training.stopwatch.start()
    images, labels = (tensor.to(training.device, non_blocking=True) for tensor in next(batches))
    training.lap(WAITING)
    training.step(training.network, images, labels, epoch=1, sums=sums)
    return {part: 1e3 * seconds for part, seconds in training.stopwatch.seconds.items()}


def measure(name: str, setting: Setting, steps: int) -> list[Row]:
    """The rows of a setting, reference first; writes no file of a run.

    Args:
        name: of the setting.
        setting: what to train.
        steps: how many count, of each training.

    Raises:
        UserError: the identities are too few for the losses or more than the data set has.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = DataConfig(height=setting.height, width=setting.width, identities=setting.identities, instances=INSTANCES)
    model = ModelConfig(setting.backbone)
    with TemporaryDirectory() as folder:
        trainings = [
            Training(TrainConfig(data, model, kernels=kernels, output=Path(folder)), device, profile=True)
            for kernels in KERNELS
        ]
        batches = endless(trainings[0])
        found = [[] for _ in trainings]
        with tqdm(total=(1 + steps) * len(trainings), desc=name, unit=" step", leave=False) as bar:
            for _ in range(1 + steps):
                for training, timed in zip(trainings, found, strict=True):
                    timed.append(timed_step(training, batches))
                    bar.update()
    return [
        Row(
            name,
            kernels,
            setting.identities * INSTANCES,
            {part: [step[part] for step in timed[1:]] for part in timed[0]},
        )
        for kernels, timed in zip(KERNELS, found, strict=True)
    ]


def mark(*figures: list[float]) -> str:
    """A ~ if one of them spreads too much over the steps, else a space."""
    quantiles = [np.quantile(steps, (0.2, 0.5, 0.8)) for steps in figures]
    return "~" if any(high - low > MOST_SPREAD * median for low, median, high in quantiles) else " "


def cells(row: Row) -> tuple[str | int, ...]:
    """The row in the printed table."""
    whole = row.milliseconds()
    low, median, high = np.quantile(whole, (0.2, 0.5, 0.8))
    return (
        row.setting,
        row.batch,
        row.kernels,
        f"{row.images_per_second():8.1f}{mark(whole)}",
        f"{median:7.0f}{mark(whole)} ({low:.0f}, {high:.0f})",
        f"{row.share(*HEAD):6.1%}{mark(row.milliseconds(*HEAD))}",
        f"{row.share(WAITING):16.1%}{mark(row.milliseconds(WAITING))}",
    )


def report(rows: Sequence[Row], markdown: bool = False) -> str:
    """The table and, beneath it, how much faster each setting trains with the kernels."""
    header = ("setting", "batch", "kernels", "images/s", "ms a step (20%, 80%)", "head", WAITING)
    by_setting: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_setting.setdefault(row.setting, {})[row.kernels] = row
    ratios = [ratio(found[REFERENCE], found[FUSED]) for found in by_setting.values()]
    return "\n\n".join([table(header, [cells(row) for row in rows], markdown), "\n".join(ratios)])


def ratio(reference: Row, fused: Row) -> str:
    """The line beneath the table for one setting."""
    faster = fused.images_per_second() / reference.images_per_second()
    marked = mark(reference.milliseconds(), fused.milliseconds())
    return f"{fused.setting}: {FUSED} over {REFERENCE}, images/s: {faster:.2f}x{marked}".rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Times the whole training step with the plain reference operators and with the fused kernels, in "
        "turns, and prints what part of it is the head and what part is waiting for data.",
        exit_on_error=False,
    )
    names = list(SETTINGS)
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="backbones, each at its image size")
    parser.add_argument("--steps", type=PositiveInt, default=7, help="steps that count, of each training")
    defaults = ", ".join(f"{setting.identities} for {name}" for name, setting in SETTINGS.items())
    parser.add_argument(
        "--identities", type=PositiveInt, help=f"in a batch, with {INSTANCES} images of each; by default {defaults}"
    )
    parser.add_argument("--threads", type=PositiveInt, help="of the training process; by default PyTorch's choice")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    found = []
    for name in options.settings:
        setting = SETTINGS[name]
        if options.identities:
            setting = replace(setting, identities=options.identities)
        found += measure(name, setting, options.steps)
    print(report(found))


if __name__ == "__main__":
    errors.run(main, PROGRAM)

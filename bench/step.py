"""Images per second of the whole training step, with the kernels and with the plain reference.

Both trainings start from the same random weights, on the embedded data set and with average pooling. They take a step
each in turn, after one that does not count, and their batches from one loader. The head's share is that of head and
losses, forward and backward, and of the memory's write.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

import cge_kernels
from bench.cases import EAGER, OURS
from bench.measure import Instant, default_device, take_turns
from bench.results import Figure
from cge_fast.build import Run, build_run
from cge_fast.metrics import EpochMetrics
from cge_fast.options import DataConfig, ModelConfig, TrainConfig
from cge_fast.step import training_step

UNITS = {"images": "images/s", "step": "s"}  # of the others %
BACKENDS = {OURS: "auto", EAGER: "reference"}
# By backbone. On two CPU cores a step of ResNet-50 with 64 images takes half a minute, so its batch is smaller.
SETTINGS = {
    "resnet18": DataConfig(height=128, width=64, identities=16, instances=4),
    "resnet50": DataConfig(height=384, width=128, identities=4, instances=4),
}


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench step`."""
    names = list(SETTINGS)
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="backbones, each at its image size")
    parser.add_argument("--steps", type=PositiveInt, default=7, help="steps that count, of each training")
    parser.add_argument("--identities", type=PositiveInt, help="in a batch, with 4 images of each")


def measure(settings: list[str], steps: int, identities: int | None) -> Iterator[Figure]:
    """Images per second, time of a step, and what of it are the head and the waiting for data; writes no run.

    Raises:
        UserError: the identities are too few for the losses or more than the data set has.
    """
    for name in settings:
        data = replace(SETTINGS[name], identities=identities or SETTINGS[name].identities)
        place = "step", f"B {data.identities * data.instances}, {data.height}x{data.width}", name
        with TemporaryDirectory() as folder:
            config = TrainConfig(data, ModelConfig(name), output=Path(folder))
            runs = {contender: build_run(config, default_device()) for contender in BACKENDS}
            batches = endless(runs[OURS])
            timed = {
                contender: partial(timed_step, run, batches, BACKENDS[contender]) for contender, run in runs.items()
            }
            for contender, parts in take_turns(timed, steps, warmup=1).items():
                for part, samples in parts.items():
                    yield Figure.median(*place, contender, part, UNITS.get(part, "%"), samples=samples)


def endless(run: Run) -> Iterator[tuple[Tensor, ...]]:
    """Batches of the run's loader, epoch after epoch."""
    for epoch in count(1):
        run.sampler.epoch = epoch
        yield from run.loader


def timed_step(run: Run, batches: Iterator[tuple[Tensor, ...]], backend: str) -> dict[str, float]:
    """Images per second and seconds of one step on a backend, and the shares of head and waiting in percent."""
    moments = {"start": Instant(run.device)}

    def moment(name: str) -> None:
        moments[name] = Instant(run.device)

    def map_is_there(backbone: nn.Module, inputs: tuple[Tensor, ...], feature_map: Tensor) -> None:
        moment("map")
        feature_map.register_hook(lambda gradient: moment("gradient of the map"))

    pixels, drawn, labels = (tensor.to(run.device, non_blocking=True) for tensor in next(batches))
    images = run.augment(pixels, drawn)
    moment("batch")
    metrics = EpochMetrics(run.criterion.weights, run.config.model.stripes, run.device)
    with (
        run.model.backbone.register_forward_hook(map_is_there),
        run.optimizer.register_step_post_hook(lambda *_: moment("optimizer")),
        cge_kernels.backend(backend),
    ):
        training_step(run, images, labels, momentum=0.5, metrics=metrics)
    moment("end")
    whole, waiting = moments["end"] - moments["start"], moments["batch"] - moments["start"]
    head = (moments["gradient of the map"] - moments["map"]) + (moments["end"] - moments["optimizer"])
    return {"images": len(images) / whole, "step": whole, "head": 1e2 * head / whole, "waiting": 1e2 * waiting / whole}

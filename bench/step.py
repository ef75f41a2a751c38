"""Images per second of the whole training step, with the kernels and with the plain reference.

Both trainings start from the same random weights, on the embedded data set and with average pooling. They take a step
each in turn, after one that does not count, so that whatever else the machine does falls on both, and both take their
batches from one loader. The head's share is that of head and losses, forward and backward, and of the memory's write.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

import cge_kernels
from bench.cases import BACKENDS, EAGER, OURS
from bench.measure import Instant, default_device
from bench.results import Figure
from cge_fast.build import Run, build_run
from cge_fast.metrics import EpochMetrics
from cge_fast.options import DataConfig, ModelConfig, TrainConfig
from cge_fast.step import training_step

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
    """Images per second, time of a step, and what of it are the head and the waiting for data.

    Raises:
        UserError: the identities are too few for the losses or more than the data set has.
    """
    for name in settings:
        data = replace(SETTINGS[name], identities=identities or SETTINGS[name].identities)
        batch = data.identities * data.instances
        place = "step", f"B {batch}, {data.height}x{data.width}", name
        for contender, parts in timed_steps(name, data, steps).items():
            rates = [batch / seconds for seconds in parts["step"]]
            yield Figure.median(*place, contender, "images", "images/s", samples=rates)
            yield Figure.median(*place, contender, "step", "s", samples=parts["step"])
            for part in ("head", "waiting for data"):
                shares = [1e2 * some / whole for some, whole in zip(parts[part], parts["step"], strict=True)]
                yield Figure.median(*place, contender, f"share of {part}", "%", samples=shares)


def timed_steps(backbone: str, data: DataConfig, steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each step and its parts, by contender; writes no file of a run."""
    found: dict[str, dict[str, list[float]]] = {OURS: defaultdict(list), EAGER: defaultdict(list)}
    with TemporaryDirectory() as folder:
        config = TrainConfig(data, ModelConfig(backbone), output=Path(folder))
        runs = {contender: build_run(config, default_device()) for contender in found}
        batches = endless(runs[OURS])
        for number in tqdm(range(1 + steps), desc=backbone, unit=" round"):
            for contender, run in runs.items():
                with cge_kernels.backend(BACKENDS[contender]):
                    for part, seconds in timed_step(run, batches).items():
                        found[contender][part] += [seconds] if number else []
    return found


def endless(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the run's loader, epoch after epoch."""
    for epoch in count(1):
        run.sampler.epoch = epoch
        yield from run.loader


def timed_step(run: Run, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Seconds of one step, and in it of the head and of the waiting for its batch."""
    classification = run.criterion.classification
    write_memory, moments = classification.write_memory, {}

    def moment(name: str) -> None:
        moments[name] = Instant(run.device)

    def map_is_there(backbone: nn.Module, inputs: tuple[Tensor, ...], feature_map: Tensor) -> None:
        moment("map")
        feature_map.register_hook(lambda gradient: moment("gradient of the map"))

    def timed_write(*arguments) -> None:
        moment("write")
        write_memory(*arguments)
        moment("written")

    moment("start")
    images, labels = (tensor.to(run.device, non_blocking=True) for tensor in next(batches))
    moment("batch")
    hook = run.model.backbone.register_forward_hook(map_is_there)
    metrics = EpochMetrics(run.criterion.weights, run.config.model.stripes, run.device)
    with hook, patch.object(classification, "write_memory", timed_write):
        training_step(run, images, labels, momentum=0.5, metrics=metrics)
    moment("end")
    head = (moments["gradient of the map"] - moments["map"]) + (moments["written"] - moments["write"])
    whole, waiting = moments["end"] - moments["start"], moments["batch"] - moments["start"]
    return {"step": whole, "head": head, "waiting for data": waiting}

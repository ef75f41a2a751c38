"""Evaluates a trained network: python -m cge_fast.evaluate --help"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from cge_fast import checkpoint, data, errors, model
from cge_fast.options import (
    DataConfig,
    EvaluationConfig,
    TrainConfig,
    as_dataclass,
    parse_settings,
    program_parser,
    read_settings,
)

PROGRAM = "cge_fast.evaluate"
SHOWN_RANKS = (1, 5, 10)


@dataclass
class EvaluateConfig:
    """Settings of an evaluation; those that are not given are the checkpoint's own."""

    checkpoint: Path
    """Folder of the checkpoint, like runs/.../checkpoints/last."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = program_parser(PROGRAM, "Ranks the gallery for every query with a trained network.")
    parser.add_class_arguments(EvaluateConfig)
    folder = Path(parse_settings(parser, arguments).checkpoint)
    trained = read_settings(checkpoint.config_file(folder))
    take_defaults(parser, trained)
    config = as_dataclass(parser, parse_settings(parser, arguments), EvaluateConfig)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = model.load(folder, trained, config.data, device)
    result = model.evaluate(network, data.read(config.data), config.data, config.evaluation)
    ranks = ", ".join(f"rank-{k} {result.rank(k):.1%}" for k in SHOWN_RANKS)
    counted = f"{result.queries} queries, {result.skipped} more without a match left out"
    print(f"mAP {result.mAP:.1%}, mINP {result.mINP:.1%}, {ranks} ({counted})")


def take_defaults(parser: ArgumentParser, trained: TrainConfig) -> None:
    """Makes a checkpoint's settings of data and evaluation the defaults of the options of these sections."""
    for section in ("data", "evaluation"):
        for key, value in asdict(getattr(trained, section)).items():
            parser.set_defaults({f"{section}.{key}": value})


if __name__ == "__main__":
    errors.run(main, PROGRAM)

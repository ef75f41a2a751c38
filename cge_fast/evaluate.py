"""Evaluates a trained network, or features in files: python -m cge_fast.evaluate --help"""

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from cge_fast import checkpoint, data, errors
from cge_fast.api import load
from cge_fast.build import check_backend, chosen_backend
from cge_fast.cli import add_settings, as_dataclass, parse_settings, program_parser, read_settings, set_defaults
from cge_fast.data.sets import each_set
from cge_fast.distributed import rank
from cge_fast.errors import UserError
from cge_fast.evaluation import feature_file
from cge_fast.evaluation.features import evaluate, retrieval
from cge_fast.evaluation.ranking import Retrieval
from cge_fast.options import TRAINING_ONLY, Backend, DataConfig, EvaluationConfig
from cge_fast.ranks import start_ranks, stop_ranks

PROGRAM = "cge_fast.evaluate"
SHOWN_RANKS = (1, 5, 10)

Settings = TypeVar("Settings")


@dataclass
class EvaluateConfig:
    """Settings of an evaluation; those that are not given are the checkpoint's own."""

    checkpoint: Path | None = None
    """Folder of the checkpoint, like runs/.../checkpoints/last, or of the run."""
    query: Path | None = None
    """Instead of a checkpoint: file of the queries' features and labels, .npz or .parquet, as cge_fast.embed writes."""
    gallery: Path | None = None
    """And of the gallery's."""
    output: Literal["text", "json"] = "text"
    """What to print: a line for each data set, or a JSON array with an object for each."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    backend: Backend = "auto"
    """Operators: Triton kernels on a GPU and else for the CPU, or one of these, or the plain reference."""


def settings(
    parser: ArgumentParser, arguments: Sequence[str], kind: type[Settings], unread: Collection[str] = ()
) -> Settings:
    """The settings on the command line; of data, evaluation and backend the checkpoint's, if there is one, come first.

    unread: those that the program does not read, besides TRAINING_ONLY, or that the parser has already.

    Raises:
        ArgumentError, UserError: the command line or the checkpoint cannot be read.
    """
    add_settings(parser, kind, TRAINING_ONLY | {*unread})
    if folder := parse_settings(parser, arguments).checkpoint:
        set_defaults(parser, read_settings(checkpoint.config_file(folder)), "data", "evaluation", "backend")
    return as_dataclass(parser, parse_settings(parser, arguments), kind)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    purpose = "Ranks the gallery for every query with a trained network, or features in files."
    parser = program_parser(PROGRAM, purpose, "--checkpoint DIR [--SETTING VALUE ...]")
    config = settings(parser, sys.argv[1:] if arguments is None else arguments, EvaluateConfig)
    given = [value is not None for value in (config.checkpoint, config.query, config.gallery)]
    if given not in ([True, False, False], [False, True, True]):
        raise UserError("checkpoint: give --checkpoint, or features by --query and --gallery")

    device, rows = start_ranks(), []
    folder = config.checkpoint
    for name, result in of_checkpoint(config, folder, device) if folder else of_files(config, device):
        counted = f"{result.queries} queries, {result.skipped} more without a match left out"
        rows.append({"data": name, **result.row(), "queries": result.queries, "skipped": result.skipped})
        if rank() == 0 and config.output == "text":
            ranks = ", ".join(f"rank-{k} {result.rank(k):.1%}" for k in SHOWN_RANKS)
            which = f"{name}: " if "+" in config.data.name else ""
            print(f"{which}mAP {result.mAP:.1%}, mINP {result.mINP:.1%}, {ranks} ({counted})", flush=True)
    if rank() == 0 and config.output == "json":
        print(json.dumps(rows, indent=1))
    stop_ranks()


def of_checkpoint(config: EvaluateConfig, folder: Path, device: torch.device) -> Iterator[tuple[str, Retrieval]]:
    """Each data set's name and figures.

    Raises:
        UserError: the network or a data set cannot be read.
    """
    sets = [(one, data.read(one, ["query", "gallery"])) for one in each_set(config.data)]
    with chosen_backend(config.backend):
        check_backend(config.backend, device)
        model = load(folder, device, config.data, config.evaluation).model
        for one, reid_set in sets:
            yield one.name, evaluate(model, reid_set, one, config.evaluation)


def of_files(config: EvaluateConfig, device: torch.device) -> Iterator[tuple[str, Retrieval]]:
    """The queries' file and the figures.

    Raises:
        UserError: a file cannot be read, or the two are not of one network.
    """
    query, gallery = (
        feature_file.read(getattr(config, name), name, ("identities", "cameras")) for name in ("query", "gallery")
    )
    feature_file.require_alike(query, gallery)

    def numbers(name: str) -> tuple[Tensor, ...]:
        labels = [getattr(query, name), getattr(gallery, name)]
        of_both = np.unique(np.concatenate(labels), return_inverse=True)[1]
        return torch.from_numpy(of_both).to(device).split([len(part) for part in labels])

    labels = zip(numbers("identities"), numbers("cameras"), strict=True)
    arguments = [(one.features.to(device), *of_one) for one, of_one in zip((query, gallery), labels, strict=True)]
    yield str(config.query), retrieval([*arguments[0], *arguments[1]], config.evaluation)


if __name__ == "__main__":
    errors.run(main, PROGRAM)

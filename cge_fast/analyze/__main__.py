"""Looks into trained networks: python -m cge_fast.analyze --help"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from cge_fast import checkpoint, errors
from cge_fast.analyze.loss_cdf import loss_cdf
from cge_fast.analyze.ranked import ranked
from cge_fast.analyze.saliency import saliency
from cge_fast.analyze.stripes import levels, precision
from cge_fast.analyze.trained import open_checkpoint
from cge_fast.analyze.weights import weights
from cge_fast.cli import add_settings, as_dataclass, parse_settings, program_parser, read_settings, set_defaults
from cge_fast.errors import UserError
from cge_fast.options import RANKING_ONLY, TRAINING_ONLY, DataConfig, EvaluationConfig

PROGRAM = "cge_fast.analyze"

ANALYSES = {
    "levels": (levels, "how many stripes classify each training image correctly, from easiest to hardest (CGE only)"),
    "precision": (precision, "how many training images each stripe's memory classifies correctly (CGE only)"),
    "loss-cdf": (loss_cdf, "which share of the loss which share of the training images makes"),
    "saliency": (saliency, "where the networks look in some test images"),
    "weights": (weights, "the revision's weights of true and false classes over the training images (CGE only)"),
    "ranked": (ranked, "the first gallery images of the worst, of random and of the best queries"),
}
OF_ONE = RANKING = ("ranked",)  # the others compare as many checkpoints as are given
COUNTS = {  # defaults and helps of options
    "saliency": {"images": (8, "how many test images")},
    "ranked": {"queries": (3, "how many of the worst queries, of random ones and of the best")},
}


@dataclass
class LookConfig:
    """Settings to look with; those that are not given are each checkpoint's own."""

    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = program_parser(PROGRAM, "Looks into trained networks: writes a picture and a table of the same numbers.")
    commands = parser.add_subcommands()
    subparsers = {name: subparser(name, help_) for name, (_, help_) in ANALYSES.items()}
    for name, command in subparsers.items():
        commands.add_subcommand(name, command, help=ANALYSES[name][1])
    parsed = parse_settings(parser, arguments)
    name, options = parsed.subcommand, parsed[parsed.subcommand]
    folders = options.checkpoint
    labels = options.labels or [None] * len(folders)
    if len(labels) != len(folders):
        raise UserError(f"labels: {len(labels)} for {len(folders)} checkpoints, give one for each")
    opened = []
    for folder, label in zip(folders, labels, strict=True):
        set_defaults(subparsers[name], read_settings(checkpoint.config_file(folder)), "data", "evaluation")
        look = as_dataclass(subparsers[name], parse_settings(parser, arguments)[name], LookConfig)
        opened.append(open_checkpoint(folder, label, look.data, look.evaluation))
    for label, count in Counter(trained.label for trained in opened).items():
        if count > 1:
            raise UserError(f"labels: {count} checkpoints are called {label}, give each a name of its own")
    options.output.mkdir(parents=True, exist_ok=True)  # before the work, which may take long
    analysis, _ = ANALYSES[name]
    counts = {option: options[option] for option in COUNTS.get(name, {})}
    written = analysis(opened[0] if name in OF_ONE else opened, options.output, **counts)
    print(f"{written.summary}\n{written.picture} and {written.table}")


def subparser(name: str, help_: str) -> ArgumentParser:
    """The options of one analysis."""
    parser = program_parser(f"{PROGRAM} {name}", f"Shows {help_}.", "--checkpoint DIR [--SETTING VALUE ...]")
    number, several = (1, "") if name in OF_ONE else ("+", ", or several to compare")
    where = f"folder like runs/.../checkpoints/last{several}"
    parser.add_argument("--checkpoint", type=Path, nargs=number, required=True, help=where)
    labels = "what to call the checkpoints; without it, by their runs' folders"
    parser.add_argument("--labels", type=str, nargs="+", help=labels)
    parser.add_argument("--output", type=Path, default=Path("analyses"), help="folder of the picture and the table")
    for option, (default, counted) in COUNTS.get(name, {}).items():
        parser.add_argument(f"--{option}", type=PositiveInt, default=default, help=counted)
    add_settings(parser, LookConfig, TRAINING_ONLY if name in RANKING else TRAINING_ONLY | RANKING_ONLY)
    return parser


if __name__ == "__main__":
    errors.run(main, PROGRAM)

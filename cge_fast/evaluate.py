"""Evaluates a trained network: python -m cge_fast.evaluate --help"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cge_fast import checkpoint, data, errors
from cge_fast.build import check_backend, chosen_backend, load_model
from cge_fast.cli import add_settings, as_dataclass, parse_settings, program_parser, read_settings, set_defaults
from cge_fast.distributed import rank
from cge_fast.evaluation.features import evaluate
from cge_fast.options import TRAINING_ONLY, Backend, DataConfig, EvaluationConfig
from cge_fast.ranks import start_ranks, stop_ranks

PROGRAM = "cge_fast.evaluate"
SHOWN_RANKS = (1, 5, 10)


@dataclass
class EvaluateConfig:
    """Settings of an evaluation; those that are not given are the checkpoint's own."""

    checkpoint: Path
    """Folder of the checkpoint, like runs/.../checkpoints/last, or of the run."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    backend: Backend = "auto"
    """Operators: Triton kernels on a GPU and else for the CPU, or one of these, or the plain reference."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    purpose = "Ranks the gallery for every query with a trained network."
    parser = program_parser(PROGRAM, purpose, "--checkpoint DIR [--SETTING VALUE ...]")
    add_settings(parser, EvaluateConfig, TRAINING_ONLY)
    folder = checkpoint.opened(parse_settings(parser, arguments).checkpoint)
    trained = read_settings(checkpoint.config_file(folder))
    set_defaults(parser, trained, "data", "evaluation", "backend")
    config = as_dataclass(parser, parse_settings(parser, arguments), EvaluateConfig)

    device = start_ranks()
    with chosen_backend(config.backend):
        check_backend(config.backend, device)
        model = load_model(folder, trained, config.data, device)
        result = evaluate(model, data.read(config.data, ["query", "gallery"]), config.data, config.evaluation)
    ranks = ", ".join(f"rank-{k} {result.rank(k):.1%}" for k in SHOWN_RANKS)
    counted = f"{result.queries} queries, {result.skipped} more without a match left out"
    if rank() == 0:
        print(f"mAP {result.mAP:.1%}, mINP {result.mINP:.1%}, {ranks} ({counted})")
    stop_ranks()


if __name__ == "__main__":
    errors.run(main, PROGRAM)

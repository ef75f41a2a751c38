"""Evaluates a trained network: python -m cge_fast.evaluate --help"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from cge_fast import checkpoint, data, errors, model
from cge_fast.config import DataConfig, EvaluationConfig, as_dataclass, parse_settings, program_parser, read_settings
from cge_fast.operators import check_backend

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
    for section in ("data", "evaluation"):
        for key, value in asdict(getattr(trained, section)).items():
            parser.set_defaults({f"{section}.{key}": value})
    config = as_dataclass(parser, parse_settings(parser, arguments), EvaluateConfig)

    weights = checkpoint.load_weights(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_backend(trained.kernels, device)
    only_on_gpu = trained.optim.precision == "float16" and device.type == "cpu"
    precision = model.compute_precision("auto" if only_on_gpu else trained.optim.precision, device)
    trained.model.pretrained, trained.model.weights = False, None  # the checkpoint's weights follow
    classes = checkpoint.classes(weights, folder)
    network = model.build(
        trained.model, trained.loss, config.data, classes, trained.optim.epochs, precision, trained.kernels
    )
    checkpoint.fit(network, weights, folder)
    result = model.evaluate(network.to(device), data.read(config.data), config.data, config.evaluation)
    ranks = ", ".join(f"rank-{k} {result.rank(k):.1%}" for k in SHOWN_RANKS)
    counted = f"{result.queries} queries, {result.skipped} more without a match left out"
    print(f"mAP {result.mAP:.1%}, mINP {result.mINP:.1%}, {ranks} ({counted})")


if __name__ == "__main__":
    errors.run(main, PROGRAM)

"""Writes images' features to a file: python -m cge_fast.embed --help"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cge_fast import checkpoint, data, errors, files
from cge_fast.api import TrainedModel, load
from cge_fast.build import check_backend, chosen_backend
from cge_fast.cli import program_parser
from cge_fast.data.images import Image, ReidSet, Split, without_corrupt
from cge_fast.data.walk import image_files
from cge_fast.distributed import rank
from cge_fast.errors import UserError
from cge_fast.evaluate import settings
from cge_fast.evaluation import feature_file
from cge_fast.evaluation.feature_file import FeatureFile
from cge_fast.evaluation.features import embed
from cge_fast.options import Backend, DataConfig, EvaluationConfig
from cge_fast.ranks import start_ranks, stop_ranks

PROGRAM = "cge_fast.embed"
MADE_WITH = {"data": ("height", "width", "interpolation", "normalisation"), "evaluation": ("neck", "flip_test")}

UNREAD = ("evaluation.metric", "evaluation.rerank")  # which compare features


@dataclass
class EmbedConfig:
    """What to embed; settings that are not given are the checkpoint's own."""

    checkpoint: Path
    """Folder of the checkpoint, like runs/.../checkpoints/last, or of the run."""
    output: Path
    """File to write: .npz, or .parquet (which needs pyarrow)."""
    images: Path | None = None
    """Folder whose images to embed, at any depth; without it those of the data set's split."""
    split: Split = "gallery"
    """Which images of the data set."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    backend: Backend = "auto"
    """Operators: Triton kernels on a GPU and else for the CPU, or one of these, or the plain reference."""


def listed(config: EmbedConfig) -> list[Image]:
    """The images to embed.

    Raises:
        UserError: there is none, or the data set cannot be read.
    """
    if config.images is None:
        return getattr(data.read(config.data, [config.split]), config.split)
    images = [Image(path.absolute(), 0, 0) for path in image_files(config.images, "images")]
    if config.data.skip_corrupt:
        found, corrupt = without_corrupt(ReidSet([], [], images))
        errors.notice(f"left out {len(corrupt)} corrupt images")
        images = found.gallery
        if not images:
            raise UserError(f"images: {config.images} holds no readable image")
    return images


def made_by(opened: TrainedModel) -> dict[str, Any]:
    """What features depend on besides the images: the network's digest, how images are read, and what is compared."""
    names = [(section, name) for section, names in MADE_WITH.items() for name in names]
    settings = {name: getattr(getattr(opened.config, section), name) for section, name in names}
    return {"model": files.sha256(opened.folder / checkpoint.MODEL), **settings}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    purpose = "Writes images' features to a file, with their paths and labels."
    parser = program_parser(PROGRAM, purpose, "--checkpoint DIR --output FILE [--SETTING VALUE ...]")
    config = settings(parser, sys.argv[1:] if arguments is None else arguments, EmbedConfig, UNREAD)
    feature_file.check_output(config.output)
    images = listed(config)

    device = start_ranks()
    with chosen_backend(config.backend):
        check_backend(config.backend, device)
        opened = load(config.checkpoint, device, config.data, config.evaluation)
        whose = "the folder's" if config.images else config.split
        features = embed(opened.model, images, config.data, config.evaluation, whose)
    if rank() == 0:
        identities, cameras = zip(*(image.labels for image in images), strict=True)
        labels = {} if config.images else {"identities": np.array(identities), "cameras": np.array(cameras)}
        paths = np.array([str(image.path) for image in images])
        feature_file.write(config.output, FeatureFile(features, paths, **labels, made_by=made_by(opened)))
        print(f"{config.output} written: {len(images)} features of {features.shape[1]} numbers")
    stop_ranks()


if __name__ == "__main__":
    errors.run(main, PROGRAM)

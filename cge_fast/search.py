"""Finds the images of a gallery that are most like others: python -m cge_fast.search --help"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt

from cge_fast import errors
from cge_fast.api import load
from cge_fast.build import check_backend, chosen_backend
from cge_fast.cli import program_parser
from cge_fast.data.walk import image_files
from cge_fast.embed import made_by
from cge_fast.errors import UserError, printable
from cge_fast.evaluate import settings
from cge_fast.evaluation import feature_file
from cge_fast.evaluation.feature_file import FeatureFile
from cge_fast.evaluation.nearest import nearest
from cge_fast.options import Backend, DataConfig, EvaluationConfig

PROGRAM = "cge_fast.search"
MOST_DRAWN = 50  # queries, and images of each: PNG has its bounds
UNREAD = ("data.name", "data.root", "data.held_out", "data.cache", "data.skip_corrupt", "evaluation.rerank")
Row = dict[str, Any]


@dataclass
class SearchConfig:
    """What to search; settings that are not given are the checkpoint's own."""

    checkpoint: Path
    """Folder of the checkpoint, like runs/.../checkpoints/last, or of the run."""
    gallery: Path
    """Folder of images, at any depth, or a file of features that cge_fast.embed wrote with the same checkpoint."""
    query: list[Path]
    """Images that are looked for."""
    top: PositiveInt = 10
    """How many images to show for each."""
    output: Path = Path("nearest.png")
    """Picture to write, a PNG; it has at most 50 queries, and 50 images of each."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    backend: Backend = "auto"
    """Operators: Triton kernels on a GPU and else for the CPU, or one of these, or the plain reference."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    purpose = "Finds the images of a gallery that are most like others."
    parser = program_parser(PROGRAM, purpose, "--checkpoint DIR --gallery DIR --query IMAGE ... [--SETTING VALUE ...]")
    parser.add_argument("--query", type=Path, nargs="+", required=True, help="images that are looked for")
    config = settings(parser, sys.argv[1:] if arguments is None else arguments, SearchConfig, ["query", *UNREAD])
    check_output(config.output)
    read = None if config.gallery.is_dir() else feature_file.read(config.gallery, "gallery", ["paths"])
    paths = image_files(config.gallery, "gallery") if read is None else []

    with chosen_backend(config.backend):
        opened = load(config.checkpoint, None, config.data, config.evaluation)
        check_backend(config.backend, opened.device)
        query = FeatureFile(opened.embed(config.query), made_by=made_by(opened))
        gallery = read or FeatureFile(opened.embed(paths, progress=True), np.array([str(path) for path in paths]))
    feature_file.require_alike(query, gallery)
    if not len(gallery.features):
        raise UserError(f"gallery: {config.gallery} has no features")
    try:
        found = nearest(query.features, gallery.features.to(opened.device), config.evaluation.metric, config.top)
    except ValueError as error:
        raise UserError(f"checkpoint {opened.folder}: {error}") from error
    lists = [
        (image, [row_of(config, gallery, *place) for place in zip(count(1), distances, indices, strict=False)])
        for image, distances, indices in zip(config.query, *(part.tolist() for part in found), strict=True)
    ]
    print(table([{"query": image, **row} for image, rows in lists for row in rows]))
    draw(config, lists)
    print(f"{config.output} written")


def check_output(output: Path) -> None:
    """Raises UserError, before any work, if the picture cannot be drawn."""
    if output.suffix != ".png" or output.is_dir():
        raise UserError(f"output: must be a file that ends in .png, got {output}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("output: the picture needs matplotlib: pip install 'cge-fast[search]'") from error


def row_of(config: SearchConfig, gallery: FeatureFile, rank: int, distance: float, index: int) -> Row:
    """What the table says of a gallery image; distance as `nearest` has it."""
    cosine = config.evaluation.metric == "cosine"
    row: Row = {"rank": rank} | ({"similarity": -distance} if cosine else {"distance": (2 * max(0, distance)) ** 0.5})
    for name, labels in (("identity", gallery.identities), ("camera", gallery.cameras), ("image", gallery.paths)):
        row |= {} if labels is None else {name: labels[index]}
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows below their keys, in columns."""
    lines = [list(rows[0])]
    lines += [
        [f"{cell:.4f}" if isinstance(cell, float) else printable(str(cell)) for cell in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def draw(config: SearchConfig, lists: Sequence[tuple[Path, Sequence[Row]]]) -> None:
    """Writes the picture: a row for each query, then its images.

    Raises:
        UserError: an image cannot be read.
    """
    from cge_fast.analyze.rows import Shown, rows_of_images
    from cge_fast.analyze.written import write_picture

    drawn = []
    for query, rows in lists[:MOST_DRAWN]:
        images = [Shown(query, query.name)]
        for row in rows[:MOST_DRAWN]:
            score = row.get("similarity", row.get("distance"))
            images.append(Shown(Path(row["image"]), f"{row['rank']} {score:.2f} {row.get('identity', '')}".strip()))
        drawn.append(("query", images))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_picture(config.output, rows_of_images(drawn, config.data, "Nearest images of the gallery"))


if __name__ == "__main__":
    errors.run(main, PROGRAM)

"""What an analysis leaves behind: a picture, a table of the same numbers, and one line that says the main ones."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cge_fast import files
from cge_fast.analyze.trained import Trained

# Told apart by lightness too, so that grey prints can be read; lines and bars differ by pattern besides.
COLOURS = ("#1b4f8a", "#e08a2c", "#3f9c8f", "#7a1f4d", "#b8b8b8")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "--")

Row = Mapping[str, Any]


class Written(NamedTuple):
    """Where an analysis lies, and its main figures."""

    summary: str  # one line
    table: Path  # CSV
    picture: Path  # PNG


def write(output: Path | str, name: str, figure: Figure, rows: Sequence[Row], summary: str) -> Written:
    """Writes output/name.png and output/name.csv, whose columns are the keys of the rows."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    table, picture = output / f"{name}.csv", output / f"{name}.png"
    write_csv(table, rows)
    write_picture(picture, figure)
    return Written(summary, table, picture)


def write_picture(file: Path, figure: Figure) -> None:
    """Writes a figure as PNG."""
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=130, format="png")
    files.replace(file, pixels.getvalue())


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Writes a table whose columns are the keys of all rows."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    files.replace(file, text.getvalue().encode())


def plot(x: str, y: str) -> tuple[Figure, Axes]:
    """A figure and its axes, with a grid, of what is labelled so."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def labelled(checkpoints: Sequence[Trained], tables: Sequence[Sequence[Row]]) -> list[Row]:
    """The checkpoints' tables one below the other, with a first column that names the checkpoint."""
    by_label = zip(checkpoints, tables, strict=True)
    return [{"checkpoint": trained.label, **row} for trained, table in by_label for row in table]


def told(checkpoints: Sequence[Trained], texts: Iterable[str]) -> str:
    """What is said of each checkpoint, on one line."""
    return "; ".join(f"{trained.label}: {text}" for trained, text in zip(checkpoints, texts, strict=True))


def styles() -> Iterator[tuple[str, str, str]]:
    """Colour, line and hatch of one checkpoint after another."""
    return zip(cycle(COLOURS), cycle(LINES), cycle(HATCHES), strict=False)


class Sheet:
    """A titled figure of many pictures, placed in inches from its top left.

    One matplotlib axes: a layout of as many axes as there are pictures takes seconds.
    """

    def __init__(self, width: float, height: float, title: str):
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()
        self.figure.suptitle(title, y=1 - 0.1 / height, va="top")

    def picture(self, pixels: ArrayLike, left: float, top: float, size: tuple[float, float], **how: Any) -> None:
        """Draws an image `size` (width, height) large; `how` are imshow's options."""
        width, height = size
        self.axes.imshow(pixels, extent=(left, left + width, top + height, top), aspect="auto", **how)

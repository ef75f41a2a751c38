"""What an analysis leaves behind: a picture, a table of the same numbers, and one line that says the main ones."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

# Told apart by lightness too, so that grey prints can be read; lines and bars differ by pattern besides.
COLOURS = ("#1b4f8a", "#e08a2c", "#3f9c8f", "#7a1f4d", "#b8b8b8")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "--")


class Written(NamedTuple):
    """Where an analysis lies, and its main figures."""

    summary: str  # one line
    table: Path  # CSV
    picture: Path  # PNG


def write(output: Path, name: str, figure: Figure, rows: Sequence[Mapping[str, object]], summary: str) -> Written:
    """Writes output/name.png and output/name.csv, whose columns are the keys of the first row."""
    output.mkdir(parents=True, exist_ok=True)
    table, picture = output / f"{name}.csv", output / f"{name}.png"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure.savefig(picture, dpi=130)
    return Written(summary, table, picture)

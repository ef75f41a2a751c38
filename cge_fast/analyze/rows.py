"""A picture of rows of images, each with a few words above it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cge_fast.analyze.written import Sheet
from cge_fast.data.images import open_rgb
from cge_fast.options import DataConfig

WIDTH = 1.0  # inches of an image
LONGEST = 13  # characters above an image


class Shown(NamedTuple):
    """An image of a picture."""

    path: Path
    text: str  # above it
    colour: str = "black"  # of text and frame
    line: str = ""  # of the frame; without it there is none


def rows_of_images(rows: Sequence[tuple[str, Sequence[Shown]]], config: DataConfig, title: str) -> Figure:
    """A row of images for each text and images, in the size of the network's images."""
    size = width, height = WIDTH, WIDTH * config.height / config.width
    longest = max(len(images) for _, images in rows)
    sheet = Sheet(longest * width * 1.08 + 0.5, len(rows) * (height + 0.3) + 0.5, title)
    for number, (text, images) in enumerate(rows):
        top = 0.7 + number * (height + 0.3)
        sheet.axes.text(0.3, top + height / 2, text, rotation=90, ha="right", va="center", fontsize=11)
        for place, shown in enumerate(images):
            left = 0.4 + place * width * 1.08
            pixels = open_rgb(shown.path).resize((config.width, config.height))
            sheet.picture(np.asarray(pixels), left, top, size)
            if shown.line:
                frame = Rectangle((left, top), *size, fill=False, ec=shown.colour, lw=3, linestyle=shown.line)
                sheet.axes.add_patch(frame)
            heading = shown.text if len(shown.text) <= LONGEST else f"{shown.text[: LONGEST - 1]}…"
            sheet.axes.text(
                left + width / 2, top - 0.06, heading, ha="center", fontsize=10, color=shown.colour, parse_math=False
            )
    return sheet.figure

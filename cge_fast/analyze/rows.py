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
STEP = 1.12 * WIDTH  # from one to the next
LONGEST = 13  # characters above an image


class Shown(NamedTuple):
    """An image of a picture."""

    path: Path
    text: str  # above it
    colour: str = "black"  # of text and frame
    points: float = 0  # of the frame
    gap: float = 0  # inches before it


def rows_of_images(rows: Sequence[tuple[str, Sequence[Shown]]], config: DataConfig, title: str) -> Figure:
    """A row of images for each text and images, in the size of the network's images."""
    size = width, height = WIDTH, WIDTH * config.height / config.width
    longest = max(len(images) for _, images in rows)
    sheet = Sheet(longest * STEP + 1.7, len(rows) * (height + 0.45) + 0.6, title)
    for number, (text, images) in enumerate(rows):
        top, left = 0.85 + number * (height + 0.45), 1.2
        sheet.axes.text(0.15, top + height / 2, text, ha="left", va="center", fontsize=11, linespacing=1.5)
        for shown in images:
            left += shown.gap
            pixels = open_rgb(shown.path).resize((config.width, config.height))
            sheet.picture(np.asarray(pixels), left, top, size)
            if shown.points:
                sheet.axes.add_patch(Rectangle((left, top), *size, fill=False, ec=shown.colour, lw=shown.points))
            heading = shown.text if len(shown.text) <= LONGEST else f"{shown.text[: LONGEST - 1]}…"
            place = {"ha": "center", "fontsize": 10, "color": shown.colour, "parse_math": False}
            sheet.axes.text(left + width / 2, top - 0.08, heading, **place)
            left += STEP
    return sheet.figure

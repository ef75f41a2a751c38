"""Difficulty of the training images: how many stripes classify each correctly (the paper's Figure 4)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.precision import train_stripe_correct
from cge_fast.analyze.trained import Trained, require_cge
from cge_fast.analyze.written import Row, Written, told, write_comparison

OF_THREE = ("hardest", "mid-hard", "mid-easy", "easiest")  # the paper's names of 0 to 3 correct stripes of three
SMALLEST_WRITTEN = 4  # percent of the pie that have room for the number


def levels(checkpoints: Sequence[Trained], output: Path) -> Written:
    """Shares of training images with n, ..., 0 correct stripes, a pie for each checkpoint; levels.png and levels.csv.

    Raises:
        UserError: a checkpoint has no CGE, does not fit the data, or has the label of another.
    """
    require_cge(checkpoints, "levels")
    tables = [level_rows(train_stripe_correct(trained)) for trained in checkpoints]
    texts = (", ".join(f"{row['level']} {row['share']:.1%}" for row in rows) for rows in tables)
    figure = drawn(checkpoints, tables)
    return write_comparison(output, "levels", figure, checkpoints, tables, told(checkpoints, texts))


def level_rows(stripe_correct: Tensor) -> list[Row]:
    """Images and share of each level, of (images, n) bool; the easiest first."""
    images, stripes = stripe_correct.shape
    counts = stripe_correct.sum(dim=1).bincount(minlength=stripes + 1).tolist()
    return [
        {
            "level": level_name(correct, stripes),
            "num_stripes_correct": correct,
            "images": counts[correct],
            "share": counts[correct] / images,
        }
        for correct in range(stripes, -1, -1)
    ]


def level_name(correct: int, stripes: int) -> str:
    """What images are called of which `correct` of `stripes` stripes are correct."""
    return OF_THREE[correct] if stripes == len(OF_THREE) - 1 else f"{correct} of {stripes} correct"


def drawn(checkpoints: Sequence[Trained], tables: Sequence[Sequence[Row]]) -> Figure:
    """Pies side by side, the easiest level lightest."""
    title, pie, legend = 0.8, 4.0, 0.6 + 0.22 * max(map(len, tables))  # inches
    height = title + pie + legend
    figure = Figure(figsize=(4.4 * len(checkpoints), height))
    figure.subplots_adjust(left=0, right=1, wspace=0.05, bottom=legend / height, top=1 - title / height)
    figure.suptitle("Difficulty of the training images", y=1 - 0.1 / height, va="top")
    panels = figure.subplots(1, len(checkpoints), squeeze=False)[0]
    for axes, trained, rows in zip(panels, checkpoints, tables, strict=True):
        lightness = [0.95 - 0.85 * index / (len(rows) - 1) for index in range(len(rows))]
        wedges, _, percentages = axes.pie(
            [row["share"] for row in rows],
            colors=[colormaps["viridis"](value) for value in lightness],
            autopct=lambda percent: f"{percent:.0f}%" if percent >= SMALLEST_WRITTEN else "",
            pctdistance=0.65,
            startangle=90,
            counterclock=False,
            wedgeprops={"edgecolor": "white", "linewidth": 1.5},
        )
        for text, value in zip(percentages, lightness, strict=True):
            text.set(color="black" if value > 0.6 else "white", fontsize=12)
        names = [f"{row['level']}: {row['share']:.1%} ({row['images']:,})" for row in rows]
        axes.legend(wedges, names, loc="upper center", bbox_to_anchor=(0.5, 0.04), title="by correct stripes")
        axes.set_title(trained.title)
    return figure

"""Difficulty of the training images: how many stripes classify each rightly (the paper's Figure 4)."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from cge_fast.analyze.precision import stripe_hits
from cge_fast.analyze.trained import Trained, require_cge, require_labels_differ
from cge_fast.analyze.written import Written, write

OF_THREE = ("hardest", "mid-hard", "mid-easy", "easiest")  # the paper's names, by how many of three stripes are right
SMALLEST_WRITTEN = 4  # percent of the pie that have room for the number


def levels(checkpoints: Sequence[Trained], output: Path) -> Written:
    """Shares of training images with n, ..., 0 stripes right, a pie for each checkpoint; levels.png and levels.csv.

    Raises:
        UserError: a checkpoint has no CGE, does not fit the data, or has the label of another.
    """
    require_labels_differ(checkpoints)
    require_cge(checkpoints, "levels")
    rows, summaries = [], []
    for trained in checkpoints:
        hits = stripe_hits(trained)
        stripes = hits.shape[1]
        counts = hits.sum(dim=1).bincount(minlength=stripes + 1).tolist()
        mine = [
            {
                "checkpoint": trained.label,
                "level": level_name(right, stripes),
                "stripes_right": right,
                "images": counts[right],
                "share": counts[right] / len(hits),
            }
            for right in range(stripes, -1, -1)
        ]
        rows += mine
        summaries.append(f"{trained.label}: " + ", ".join(f"{row['level']} {row['share']:.1%}" for row in mine))
    return write(output, "levels", drawn(rows, checkpoints), rows, "; ".join(summaries))


def level_name(right: int, stripes: int) -> str:
    """What images are called of which `right` of `stripes` stripes are right."""
    return OF_THREE[right] if stripes == len(OF_THREE) - 1 else f"{right} of {stripes} right"


def drawn(rows: Sequence[dict], checkpoints: Sequence[Trained]) -> Figure:
    """Pies side by side, the easiest level lightest."""
    most = max(row["stripes_right"] for row in rows)
    title, pie, legend = 0.8, 4.0, 0.6 + 0.22 * (most + 1)  # inches
    height = title + pie + legend
    figure = Figure(figsize=(4.4 * len(checkpoints), height))
    figure.subplots_adjust(left=0, right=1, wspace=0.05, bottom=legend / height, top=1 - title / height)
    figure.suptitle("Difficulty of the training images", y=1 - 0.1 / height, va="top")
    for axes, trained in zip(figure.subplots(1, len(checkpoints), squeeze=False)[0], checkpoints, strict=True):
        mine = [row for row in rows if row["checkpoint"] == trained.label]
        shares = [row["share"] for row in mine]
        lightness = [0.95 - 0.85 * index / (len(mine) - 1) for index in range(len(mine))]
        wedges, _, percentages = axes.pie(
            shares,
            colors=[colormaps["viridis"](value) for value in lightness],
            autopct=lambda percent: f"{percent:.0f}%" if percent >= SMALLEST_WRITTEN else "",
            pctdistance=0.65,
            startangle=90,
            counterclock=False,
            wedgeprops={"edgecolor": "white", "linewidth": 1.5},
        )
        for text, value in zip(percentages, lightness, strict=True):
            text.set(color="black" if value > 0.6 else "white", fontsize=12)
        names = [f"{row['level']}: {row['share']:.1%} ({row['images']:,})" for row in mine]
        axes.legend(wedges, names, loc="upper center", bbox_to_anchor=(0.5, 0.04), title="by stripes that are right")
        axes.set_title(trained.title)
    return figure

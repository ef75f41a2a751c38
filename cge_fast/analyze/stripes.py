"""Which stripes are correct on the training images: by stripe (the paper's Tables 1b and 2) and by image (Figure 4)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.trained import Trained, require_cge, train_batches
from cge_fast.analyze.written import Row, Written, labelled, plot, styles, told, write
from cge_kernels import stripe_correct

OF_THREE = ("hardest", "mid-hard", "mid-easy", "easiest")  # the paper's names of 0 to 3 correct stripes of three
SMALLEST_WRITTEN = 4  # percent of the pie that have room for the number


def train_stripe_correct(trained: Trained) -> Tensor:
    """(training images, n) bool: whether argmax_k s_i[k] is the image's label, ties to the lowest k."""
    batches, memory = train_batches(trained), trained.loss.memory
    correct = [stripe_correct(trained.model(images).stripes, memory, labels) for images, labels in batches]
    return torch.cat(correct).cpu()


def precision(checkpoints: Sequence[Trained], output: Path | str) -> Written:
    """Precision of each memory M_i: the share of training images that stripe i gets right; precision.png and .csv."""
    require_cge(checkpoints, "precision")
    tables = []
    for trained in checkpoints:
        correct = train_stripe_correct(trained)
        images, counts = len(correct), enumerate(correct.sum(dim=0).tolist(), start=1)
        rows = [{"stripe": i, "precision": right / images, "correct": right, "images": images} for i, right in counts]
        tables.append(rows)
    texts = (", ".join(f"{row['precision']:.1%}" for row in rows) for rows in tables)
    summary = "precision of M_1, M_2, ...: " + told(checkpoints, texts)
    return write(output, "precision", drawn_precision(checkpoints, tables), labelled(checkpoints, tables), summary)


def drawn_precision(checkpoints: Sequence[Trained], tables: Sequence[Sequence[Row]]) -> Figure:
    """Bars by stripe, one of each checkpoint beside another."""
    stripes = max(map(len, tables))
    figure, axes = plot("stripe, from the top", "precision on the training images, %")
    figure.set_figwidth(max(6, 2 + 0.75 * stripes * len(checkpoints)))
    width = 0.8 / len(checkpoints)
    for index, (trained, rows, (colour, _, hatch)) in enumerate(zip(checkpoints, tables, styles(), strict=False)):
        x = [row["stripe"] + (index - (len(checkpoints) - 1) / 2) * width for row in rows]
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": trained.label}
        bars = axes.bar(x, [100 * row["precision"] for row in rows], width, **look)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(range(1, stripes + 1), [f"$M_{{{stripe}}}$" for stripe in range(1, stripes + 1)], fontsize=12)
    axes.set(ylim=(0, 108), title="Precision of the local classifiers")
    figure.legend(loc="outside lower center")
    return figure


def levels(checkpoints: Sequence[Trained], output: Path | str) -> Written:
    """Shares of training images with n, ..., 0 correct stripes, a pie for each checkpoint; levels.png and .csv."""
    require_cge(checkpoints, "levels")
    tables = [level_rows(train_stripe_correct(trained)) for trained in checkpoints]
    texts = (", ".join(f"{row['level']} {row['share']:.1%}" for row in rows) for rows in tables)
    figure, rows = drawn_levels(checkpoints, tables), labelled(checkpoints, tables)
    return write(output, "levels", figure, rows, told(checkpoints, texts))


def level_rows(stripe_correct: Tensor) -> list[Row]:
    """Images and share of each level, of (images, n) bool; the easiest first."""
    images, n = stripe_correct.shape
    counts = stripe_correct.sum(dim=1).bincount(minlength=n + 1).tolist()
    names = OF_THREE if n == 3 else [f"{correct} of {n} correct" for correct in range(n + 1)]
    return [
        {"level": names[i], "num_stripes_correct": i, "images": counts[i], "share": counts[i] / images}
        for i in range(n, -1, -1)
    ]


def drawn_levels(checkpoints: Sequence[Trained], tables: Sequence[Sequence[Row]]) -> Figure:
    """Pies side by side, the easiest level lightest."""
    title, pie, legend = 0.8, 4.0, 0.6 + 0.22 * max(map(len, tables))  # inches
    height = title + pie + legend
    figure = Figure(figsize=(4.4 * len(checkpoints), height))
    figure.subplots_adjust(left=0, right=1, wspace=0.05, bottom=legend / height, top=1 - title / height)
    figure.suptitle("Difficulty of the training images", y=1 - 0.1 / height, va="top")
    panels = figure.subplots(1, len(checkpoints), squeeze=False)[0]
    for axes, trained, rows in zip(panels, checkpoints, tables, strict=True):
        lightness = [0.95 - 0.85 * index / (len(rows) - 1) for index in range(len(rows))]
        look = {"startangle": 90, "counterclock": False, "wedgeprops": {"edgecolor": "white", "linewidth": 1.5}}
        look["colors"] = [colormaps["viridis"](value) for value in lightness]
        look["autopct"] = lambda percent: f"{percent:.0f}%" if percent >= SMALLEST_WRITTEN else ""
        wedges, _, percentages = axes.pie([row["share"] for row in rows], pctdistance=0.65, **look)
        for text, value in zip(percentages, lightness, strict=True):
            text.set(color="black" if value > 0.6 else "white", fontsize=12)
        names = [f"{row['level']}: {row['share']:.1%} ({row['images']:,})" for row in rows]
        axes.legend(wedges, names, loc="upper center", bbox_to_anchor=(0.5, 0.04), title="by correct stripes")
        axes.set_title(trained.label)
    return figure

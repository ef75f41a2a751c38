"""How often each stripe's memory alone classifies the training images correctly (the paper's Tables 1b and 2)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.trained import Trained, require_cge, train_batches
from cge_fast.analyze.written import Row, Written, styles, told, write_comparison
from cge_kernels import stripe_correct


def train_stripe_correct(trained: Trained) -> Tensor:
    """(training images, n) bool: whether argmax_k s_i[k] is the image's label, ties to the lowest k.

    Raises:
        UserError: data and checkpoint do not fit, or an image cannot be read.
    """
    batches = train_batches(trained)
    memory = trained.loss.memory
    return torch.cat(
        [stripe_correct(trained.model(images).stripes, memory, labels).cpu() for images, labels in batches]
    )


def precision(checkpoints: Sequence[Trained], output: Path) -> Written:
    """Precision of each memory M_i: the share of training images that stripe i gets right; precision.png and .csv.

    Raises:
        UserError: a checkpoint has no CGE, does not fit the data, or has the label of another.
    """
    require_cge(checkpoints, "precision")
    tables = [
        [
            {
                "stripe": stripe,
                "precision": correct.double().mean().item(),
                "correct": correct.sum().item(),
                "images": len(correct),
            }
            for stripe, correct in enumerate(train_stripe_correct(trained).unbind(dim=1), start=1)
        ]
        for trained in checkpoints
    ]
    texts = (", ".join(f"{row['precision']:.1%}" for row in rows) for rows in tables)
    summary = "precision of M_1, M_2, ...: " + told(checkpoints, texts)
    return write_comparison(output, "precision", drawn(checkpoints, tables), checkpoints, tables, summary)


def drawn(checkpoints: Sequence[Trained], tables: Sequence[Sequence[Row]]) -> Figure:
    """Bars by stripe, one of each checkpoint beside another."""
    stripes = max(map(len, tables))
    figure = Figure(figsize=(max(6, 2 + 0.75 * stripes * len(checkpoints)), 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(checkpoints)
    for index, (trained, rows, (colour, _, hatch)) in enumerate(zip(checkpoints, tables, styles(), strict=False)):
        bars = axes.bar(
            [row["stripe"] + (index - (len(checkpoints) - 1) / 2) * width for row in rows],
            [100 * row["precision"] for row in rows],
            width,
            label=trained.title,
            color=colour,
            hatch=hatch,
            edgecolor="white",
        )
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(range(1, stripes + 1), [f"$M_{{{stripe}}}$" for stripe in range(1, stripes + 1)], fontsize=12)
    axes.set(xlabel="stripe, from the top", ylabel="precision on the training images, %", ylim=(0, 108))
    axes.set_title("Precision of the local classifiers")
    figure.legend(loc="outside lower center")
    return figure

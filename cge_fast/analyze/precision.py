"""How often each stripe's memory alone classifies the training images rightly (the paper's Tables 1b and 2)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast.analyze.trained import Trained, require_cge, require_labels_differ, train_batches
from cge_fast.analyze.written import COLOURS, HATCHES, Written, write
from cge_fast.operators import local_hits


def stripe_hits(trained: Trained) -> Tensor:
    """(training images, n) bool: whether argmax_k s_i[k] is the image's label, ties to the lowest k.

    Raises:
        UserError: data and checkpoint do not fit, or an image cannot be read.
    """
    head, hits = trained.network.head, []
    for images, labels in train_batches(trained):
        _, local_features = head.pool(trained.network.feature_map(images))
        hits.append(local_hits(local_features, head.memory, labels).cpu())
    return torch.cat(hits)


def precision(checkpoints: Sequence[Trained], output: Path) -> Written:
    """Precision of each memory M_i: the share of training images that stripe i gets right; precision.png and .csv.

    Raises:
        UserError: a checkpoint has no CGE, does not fit the data, or has the label of another.
    """
    require_labels_differ(checkpoints)
    require_cge(checkpoints, "precision")
    hits = [stripe_hits(trained) for trained in checkpoints]
    rows = [
        {
            "checkpoint": trained.label,
            "stripe": stripe,
            "precision": right.double().mean().item(),
            "right": right.sum().item(),
            "images": len(right),
        }
        for trained, found in zip(checkpoints, hits, strict=True)
        for stripe, right in enumerate(found.unbind(dim=1), start=1)
    ]
    shares = [
        f"{trained.label}: "
        + ", ".join(f"{row['precision']:.1%}" for row in rows if row["checkpoint"] == trained.label)
        for trained in checkpoints
    ]
    return write(
        output, "precision", drawn(rows, checkpoints), rows, "precision of M_1, M_2, ...: " + "; ".join(shares)
    )


def drawn(rows: Sequence[dict], checkpoints: Sequence[Trained]) -> Figure:
    """Bars by stripe, one of each checkpoint beside another."""
    stripes = max(row["stripe"] for row in rows)
    figure = Figure(figsize=(max(6, 2 + 0.75 * stripes * len(checkpoints)), 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(checkpoints)
    for index, trained in enumerate(checkpoints):
        mine = [row for row in rows if row["checkpoint"] == trained.label]
        bars = axes.bar(
            [row["stripe"] + (index - (len(checkpoints) - 1) / 2) * width for row in mine],
            [100 * row["precision"] for row in mine],
            width,
            label=trained.title,
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
        )
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_xticks(range(1, stripes + 1), [f"$M_{{{stripe}}}$" for stripe in range(1, stripes + 1)], fontsize=12)
    axes.set(xlabel="stripe, from the top", ylabel="precision on the training images, %", ylim=(0, 108))
    axes.set_title("Precision of the local classifiers")
    figure.legend(loc="outside lower center")
    return figure

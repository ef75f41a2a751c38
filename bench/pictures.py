"""Pictures of what `python -m bench operators` measured."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from bench.cases import CASES, COMPILED, EAGER, OURS
from bench.measure import Ceilings
from bench.results import Figure, origin
from bench.shapes import Shape
from bench.work import work

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {OURS: "#1b6ca8", EAGER: "#c8553d", COMPILED: "#8a8a8a"}
MARKS = {"forward": "o", "backward": "s"}


def save(figure: plt.Figure, file: Path) -> None:
    """Writes a picture with machine, versions, commit and time beneath."""
    figure.text(0.01, 0.005, "; ".join(origin().values()), fontsize=6, color="#666666")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def roofline(figures: Sequence[Figure], shape: Shape, dtype: torch.dtype, ceilings: Ceilings, file: Path) -> None:
    """FLOP/s over FLOPs per compulsory byte, beneath what a large matmul and a large copy reach."""
    needed = {str(case): work(case.operator, shape, case.pooling or "average", dtype.itemsize) for case in CASES}
    canvas, axes = plt.subplots(figsize=(11, 6))
    numbers: dict[tuple[str, str], int] = {}
    reach = []
    for found in figures:
        if found.quantity in MARKS and found.contender in COLOURS:
            least = needed[found.subject][found.quantity]
            x, y = least.flops / least.bytes, least.flops / found.value / 1e9
            reach.append(x)
            axes.scatter(x, y, marker=MARKS[found.quantity], color=COLOURS[found.contender], s=32, zorder=3)
            if found.contender == OURS:
                number = numbers.setdefault((found.subject, found.quantity), len(numbers) + 1)
                axes.annotate(str(number), (x, y), xytext=(-4, 5), textcoords="offset points", fontsize=8)
    intensity = np.geomspace(min(reach) / 2, max(*reach, ceilings.flops / ceilings.bandwidth) * 4, 200)
    roof = f"copy {ceilings.bandwidth / 1e9:.0f} GB/s, matmul {ceilings.flops / 1e9:.0f} GFLOP/s"
    axes.plot(intensity, np.minimum(intensity * ceilings.bandwidth, ceilings.flops) / 1e9, color="#444444", label=roof)
    for name, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=name)
    for direction, mark in MARKS.items():
        axes.scatter([], [], color="black", marker=mark, label=direction)
    listed = "\n".join(f"{number} {', '.join(place)}" for place, number in numbers.items())
    axes.text(1.02, 1, listed, transform=axes.transAxes, va="top", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per compulsory byte", ylabel="GFLOP/s", title=str(shape))
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.25)
    save(canvas, file)


def scaling(figures: Sequence[Figure], file: Path) -> None:
    """Time and peak memory of the head's step over N and over B, doubly logarithmic, with the fitted slopes."""
    sweeps = list(dict.fromkeys(figure.setting for figure in figures))
    labels = {"step": ("ms a step", 1e3), "peak": ("peak MB beyond the arguments", 1e-6)}
    canvas, grid = plt.subplots(2, len(sweeps), figsize=(5 * len(sweeps), 7), squeeze=False)
    for name, column in zip(sweeps, grid.T, strict=True):
        for (quantity, (label, factor)), axes in zip(labels.items(), column, strict=True):
            for contender in (OURS, EAGER):
                line = [f for f in figures if (f.setting, f.quantity, f.contender) == (name, quantity, contender)]
                sizes, values = [int(f.subject.replace(",", "")) for f in line], [f.value * factor for f in line]
                slope = f"slope {fitted_slope(sizes, values):.2f}"
                axes.plot(sizes, values, "o-", color=COLOURS[contender], label=f"{contender}, {slope}")
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set_xticks([], minor=True)
            axes.legend(fontsize=8)
            axes.grid(alpha=0.25, which="both")
    save(canvas, file)


def fitted_slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent a of the line values = b * sizes^a that fits best on a doubly logarithmic scale."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])

"""The report's pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from bench.cases import COMPILED, EAGER, OURS
from bench.ceilings import Ceilings
from bench.scaling import Point, slopes

if TYPE_CHECKING:
    from bench.report import Row
    from bench.train_step import Row as StepRow

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = {OURS: "#1b6ca8", EAGER: "#c8553d", COMPILED: "#8a8a8a"}
MARKS = {"forward": "o", "backward": "s"}


def save(figure: Figure, machine: str, file: Path) -> None:
    """Writes a picture with the machine, versions, commit and date beneath."""
    figure.text(0.01, 0.005, machine, fontsize=6, color="#666666")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def roofline(rows: Sequence["Row"], ceilings: Ceilings, machine: str, file: Path) -> None:
    """FLOP/s over FLOPs per byte at the first shape: one point for each operator, direction and contender."""
    mine = [row for row in rows if row.shape == rows[0].shape and row.direction in MARKS]
    figure, axes = plt.subplots(figsize=(11, 6))
    reach = [row.work.flops / row.work.bytes for row in mine]
    intensity = np.geomspace(min(reach) / 2, max(max(reach), ceilings.flops / ceilings.bandwidth) * 4, 200)
    roof = f"copy {ceilings.bandwidth / 1e9:.0f} GB/s, matmul {ceilings.flops / 1e9:.0f} GFLOP/s"
    axes.plot(intensity, np.minimum(intensity * ceilings.bandwidth, ceilings.flops) / 1e9, color="#444444", label=roof)
    numbers = {place: index for index, place in enumerate(dict.fromkeys((row.case, row.direction) for row in mine), 1)}
    for row in mine:
        x, y = row.work.flops / row.work.bytes, row.flops_per_second / 1e9
        axes.scatter(x, y, marker=MARKS[row.direction], color=COLOURS[row.contender], s=32, zorder=3)
        if row.contender == OURS:
            number = str(numbers[row.case, row.direction])
            axes.annotate(number, (x, y), xytext=(-4, 5), textcoords="offset points", fontsize=8)
    for name in dict.fromkeys(row.contender for row in mine):
        axes.scatter([], [], color=COLOURS[name], label=name)
    for direction, mark in MARKS.items():
        axes.scatter([], [], color="black", marker=mark, label=direction)
    listed = "\n".join(f"{number} {case}, {direction}" for (case, direction), number in numbers.items())
    axes.text(1.02, 1, listed, transform=axes.transAxes, va="top", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per compulsory byte", ylabel="GFLOP/s")
    axes.set_title(f"Operators at the shape {rows[0].shape}")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.25)
    save(figure, machine, file)


def step(rows: Sequence["StepRow"], machine: str, file: Path) -> None:
    """Stacked bars: the parts of a training step, reference and project."""
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.7 * len(rows)))
    left = np.zeros(len(rows))
    labels = [f"{row.setting}, {row.kernels}" for row in rows]
    for index, part in enumerate(rows[0].parts):
        widths = np.array([np.median(row.parts[part]) for row in rows])
        axes.barh(labels, widths, left=left, label=part, color=plt.get_cmap("tab10")(index))
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step, medians of the parts")
    axes.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    save(figure, machine, file)


def scaling(points: Sequence[Point], machine: str, file: Path) -> None:
    """Time and peak memory over N and over B, doubly logarithmic, with the fitted slopes."""
    sweeps = list(dict.fromkeys(point.sweep for point in points))
    figure, grid = plt.subplots(2, len(sweeps), figsize=(5 * len(sweeps), 7), squeeze=False)
    for column, name in enumerate(sweeps):
        for contender in dict.fromkeys(point.contender for point in points):
            mine = [point for point in points if (point.sweep, point.contender) == (name, contender)]
            sizes = [point.size for point in mine]
            exponents = slopes(mine) if len(mine) > 1 else (float("nan"),) * 2
            values = [p.times.median * 1e3 for p in mine], [p.peak_bytes / 1e6 for p in mine]
            for axes, numbers, exponent in zip(grid[:, column], values, exponents, strict=True):
                axes.plot(sizes, numbers, "o-", color=COLOURS[contender], label=f"{contender}, slope {exponent:.2f}")
        for axes, label in zip(grid[:, column], ("ms a step", "peak MB beyond the arguments"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
            ticks = sorted({point.size for point in points if point.sweep == name})
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.legend(fontsize=8)
            axes.grid(alpha=0.25, which="both")
    save(figure, machine, file)

"""Draws docs/cge.svg, the figure of the README: python docs/figures/cge.py"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

FILE = Path(__file__).parents[1] / "cge.svg"
STRIPES = "#4c78a8", "#59a14f", "#e0803a"
INK, GREY, PALE = "#222222", "#777777", "#e4e4e4"
MIDDLE = 3.05, 1.95, 0.85  # y of the three stripes' rows
TOP = 4.4  # y of the global feature's row


def main() -> None:
    """Writes the figure, with the same bytes each time."""
    figure = Figure(figsize=(11, 5.5), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11), ylim=(-0.4, 5.1))
    axes.axis("off")
    image_and_map(axes)
    global_row(axes)
    for number, (y, colour) in enumerate(zip(MIDDLE, STRIPES, strict=True), start=1):
        stripe_row(axes, number, y, colour)
    weights(axes)
    with mpl.rc_context({"svg.hashsalt": "cge"}):
        figure.savefig(FILE, metadata={"Date": None})


def image_and_map(axes: Axes) -> None:
    """A person, the backbone, and the feature map in three stripes."""
    axes.add_patch(Rectangle((0.25, 0.3), 1.1, 3.3, facecolor=PALE, edgecolor=GREY))
    axes.add_patch(Circle((0.8, 3.15), 0.22, color=GREY))
    axes.add_patch(Rectangle((0.5, 1.85), 0.6, 1.02, color=GREY))
    for x in (0.54, 0.83):
        axes.add_patch(Rectangle((x, 0.5), 0.23, 1.3, color=GREY))
    arrow(axes, (1.4, 1.95), (2.2, 1.95))
    text(axes, 1.8, 2.15, "backbone")
    for y, colour in zip(MIDDLE, STRIPES, strict=True):
        for row in range(2):
            for column in range(2):
                corner = (2.3 + 0.35 * column, y - 0.53 + 0.53 * row)
                axes.add_patch(Rectangle(corner, 0.35, 0.53, facecolor=colour, alpha=0.55, edgecolor="white"))
    text(axes, 2.65, -0.02, "feature map", va="bottom")


def global_row(axes: Axes) -> None:
    """Pooled feature, embedding, logits, and the loss of the revised logits."""
    arrow(axes, (2.65, 3.62), (3.3, TOP), bend=-0.25)
    cells(axes, 3.4, TOP, [GREY] * 6)
    text(axes, 3.94, TOP + 0.25, "global feature", va="bottom")
    arrow(axes, (4.55, TOP), (5.3, TOP))
    text(axes, 4.92, TOP + 0.12, "BNNeck", va="bottom")
    cells(axes, 5.4, TOP, [INK] * 6)
    text(axes, 5.94, TOP + 0.25, "embedding,\nthe network's result", va="bottom")
    arrow(axes, (6.55, TOP), (7.45, TOP))
    text(axes, 7.0, TOP + 0.12, "classifier", va="bottom")
    bars(axes, 7.55, TOP - 0.22, [0.2, 0.48, 0.34, 0.14, 0.26], INK)
    text(axes, 7.9, TOP - 0.26, "logits p", va="top")
    arrow(axes, (8.4, TOP), (9.28, TOP))
    text(axes, 9.45, TOP, r"$\times$", size=20)
    arrow(axes, (9.62, TOP), (10.0, TOP))
    text(axes, 10.5, TOP, "cross\nentropy", size=11)


def stripe_row(axes: Axes, number: int, y: float, colour: str) -> None:
    """One stripe: its pooled feature, the memory of it, and the cosines to every identity."""
    arrow(axes, (3.05, y), (3.3, y))
    cells(axes, 3.4, y, [colour] * 6)
    text(axes, 3.94, y + 0.15, f"stripe feature $f_{number}$", va="bottom")
    arrow(axes, (4.55, y), (5.3, y))
    text(axes, 4.92, y + 0.1, "cosine", va="bottom")
    for row in range(5):
        cells(axes, 5.4, y - 0.36 + 0.18 * row, [colour] * 6, height=0.14, alpha=0.3 + 0.12 * ((row * 3 + number) % 5))
    text(axes, 6.54, y, f"$M_{number}$", ha="left", size=12)
    arrow(axes, (6.9, y), (7.45, y))
    heights = np.array([[0.3, 0.55, 0.5, 0.12, 0.2], [0.2, 0.6, 0.15, 0.22, 0.1], [0.4, 0.22, 0.35, 0.3, 0.12]])
    bars(axes, 7.55, y - 0.3, heights[number - 1], colour)
    text(axes, 7.9, y - 0.34, f"$s_{number}$", va="top", size=12)
    arrow(axes, (8.4, y), (8.9, 1.95 + 0.25 * (2 - number)))


def weights(axes: Axes) -> None:
    """What the cosines become, and where the memory comes from."""
    bars(axes, 9.1, 1.65, [0.42, 0.62, 0.46, 0.3, 0.24], INK)
    text(axes, 9.45, 1.58, "weights", va="top")
    text(axes, 9.72, 0.98, r"$w=\left(\sigma(s_1)\,\sigma(s_2)\,\sigma(s_3)\right)^{1/3}$", size=12)
    arrow(axes, (9.45, 2.4), (9.45, TOP - 0.25))
    text(axes, 5.94, -0.22, "memory: one row for each identity,\nwritten after each step", va="bottom", size=9)
    text(axes, 7.9, -0.22, "one bar for\neach identity", va="bottom", size=9)


def cells(axes: Axes, x: float, y: float, colours: list[str], height: float = 0.22, alpha: float = 1.0) -> None:
    """A vector: small squares in a row, centred at height y."""
    for column, colour in enumerate(colours):
        corner = (x + 0.18 * column, y - height / 2)
        axes.add_patch(Rectangle(corner, 0.16, height, facecolor=colour, alpha=alpha))


def bars(axes: Axes, x: float, y: float, heights: list[float] | np.ndarray, colour: str) -> None:
    """One bar for each identity, standing on height y."""
    for column, height in enumerate(heights):
        axes.add_patch(Rectangle((x + 0.15 * column, y), 0.11, height, facecolor=colour))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """An arrow from start to end."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": GREY, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))


def text(axes: Axes, x: float, y: float, words: str, size: float = 10, **alignment: str) -> None:
    """Words at (x, y), centred unless said otherwise."""
    axes.text(x, y, words, size=size, color=INK, **({"ha": "center", "va": "center"} | alignment))


if __name__ == "__main__":
    main()

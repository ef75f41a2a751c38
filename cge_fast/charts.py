"""Curves and stacked areas as inline SVG; their colours are those of the page around them."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 380, 210  # of a chart, in pixels where it is drawn at its own size
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 8, 24  # what the axes' numbers take
DOTTED = 30  # points at most, of a curve whose points are drawn too
COLOURS = 6  # classes c0 to c5 of the page


class Series(NamedTuple):
    """What a chart draws of one thing."""

    name: str
    points: Sequence[tuple[float, float]]  # (x, y), x ascending


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers from one at or below `low` to one at or above `high`."""
    is_flat = high - low <= 1e-9 * max(abs(low), abs(high))
    rough = max(1e-30, abs(high) or 1.0) if is_flat else max(1e-30, (high - low) / count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= 0.75 * rough)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def number(value: float, percent: bool) -> str:
    """As axes and keys show it."""
    return f"{100 * value:.3g}%" if percent else f"{value:.3g}"


def chart(title: str, series: Sequence[Series], percent: bool = False, stacked: bool = False) -> str:
    """A figure of curves over epochs, with a key of their last values.

    Args:
        title: above it.
        series: with at least one point in all; if stacked, of the same x, from the lowest to the uppermost.
        percent: the values are shares.
        stacked: draw areas from 0 to 1, one above the other, the first the darkest.
    """
    series = [one for one in series if one.points]
    xs, ys = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    x_ticks = ticks(min(xs), max(xs), 6, whole=True)
    low, high = min(ys), max(ys)
    y_ticks = ticks(0, 1, 5) if stacked else ticks(low if low < 0 or 0.5 * high < low < high else 0, high, 4)

    def place(x: float, y: float) -> str:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    drawn = []
    for y in y_ticks:
        (left, height), right = place(x_ticks[0], y).split(","), WIDTH - RIGHT
        drawn.append(f'<path class="grid" d="M{left},{height}H{right}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{height}" dy=".35em" text-anchor="end">{number(y, percent)}</text>')
    for x in x_ticks:
        across, _ = place(x, 0).split(",")
        drawn.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="middle">{x:g}</text>')
    floor, keys = [(x, 0.0) for x, _ in series[0].points], []
    for index, one in enumerate(series):
        colour, shade = f"c{index % COLOURS}", ""
        if stacked:
            top = [(x, low + y) for (x, low), (_, y) in zip(floor, one.points, strict=True)]
            colour, shade = "c0", f' style="opacity:{1 - 0.85 * index / max(1, len(series) - 1):.2f}"'
            corners, name = " ".join(place(*point) for point in (*floor, *top[::-1])), escape(one.name)
            drawn.append(f'<polygon class="{colour}"{shade} points="{corners}"><title>{name}</title></polygon>')
            floor = top
        else:
            corners = " ".join(place(*point) for point in one.points)
            drawn.append(f'<polyline class="{colour}" points="{corners}"><title>{escape(one.name)}</title></polyline>')
            for x, y in one.points if len(one.points) <= DOTTED else ():
                centre = 'cx="{}" cy="{}"'.format(*place(x, y).split(","))
                told = f"<title>{escape(one.name)}, epoch {x:g}: {number(y, percent)}</title>"
                drawn.append(f'<circle class="{colour}" {centre} r="2.5">{told}</circle>')
        mark = f'<rect class="{colour}"{shade} width="24" height="10"/>'
        mark = mark if stacked else f'<polyline class="{colour}" points="0,5 24,5"/>'
        swatch = f'<svg viewBox="0 0 24 10">{mark}</svg>'
        last = f"{one.points[-1][1]:.1%}" if percent else number(one.points[-1][1], percent)
        keys.append(f"<span>{swatch}{escape(one.name)} <b>{last}</b></span>")
    key = "".join(keys)
    inside, named = "".join(drawn), escape(title)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{named}">{inside}</svg>'
    return f'<figure><figcaption>{named}</figcaption>{picture}<p class="key">{key}</p></figure>'

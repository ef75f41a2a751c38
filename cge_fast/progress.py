"""Progress bars on a terminal; where stderr is a file, a line now and then."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 30  # seconds without a line, after which a bar becomes one
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


class Lines:
    """A file for tqdm that nobody watches: a bar's state is a line if there was none for a while, and else dropped."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def write(self, text: str) -> None:
        """What tqdm draws after a carriage return."""
        if text.strip() and time.monotonic() - self.last >= EVERY:
            say(text.strip())

    def flush(self) -> None:
        """Lines are whole anyway."""


LINES = Lines()


def say(line: str) -> None:
    """Prints a line on stderr, above the bars that are there."""
    LINES.last = time.monotonic()
    tqdm.write(line, file=sys.stderr)


def progress(iterable: Iterable | None = None, *, what: str, unit: str, show: bool = True, **options: Any) -> tqdm:
    """tqdm's progress of an iterable, or of a `total` that is counted up by `update`; it vanishes once done.

    Args:
        iterable: what is gone through, if anything.
        what: is done, like `ranking`.
        unit: of what is counted, in the plural, like `queries`.
        show: false for all ranks but the first, and where nobody wants to see it.
        options: of tqdm.
    """
    look = {"dynamic_ncols": True, "unit": f" {unit}"}
    if not sys.stderr.isatty():
        look = {
            "file": LINES,
            "bar_format": LINE,
            "unit": unit,
            "mininterval": 1,
            "delay": 1e-9,
        }  # no line of its begin
    return tqdm(iterable, desc=what, disable=not show, **{"leave": False, **look, **options})

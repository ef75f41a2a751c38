"""Tables that the benches print, as plain text or in Markdown."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str | int]], markdown: bool = False) -> str:
    """The rows below the header: text to the left, numbers to the right, thousands apart.

    In every row the columns of numbers are those of the first one.
    """
    align = [str.ljust if isinstance(cell, str) else str.rjust for cell in rows[0]]
    cells = [list(header), *([cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[place(*cell) for place, *cell in zip(align, row, widths, strict=True)] for row in cells]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = [
        "-" * (width - 1) + (":" if place is str.rjust else "-") for place, width in zip(align, widths, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])

"""A page of HTML in one file, which fetches nothing: its look, and tables and pictures in it."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL.Image import Image

STYLE = Path(__file__).with_suffix(".css")


def page(title: str, subtitle: str, sections: Mapping[str, str]) -> bytes:
    """The page; `sections` are HTML by heading, an empty one without it."""
    body = "".join(
        f"<section>{f'<h2>{escape(heading)}</h2>' if heading else ''}{html}</section>"
        for heading, html in sections.items()
        if html
    )
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE.read_text()}</style></head>'
    )
    return f"{head}<body><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>{body}</body></html>\n".encode()


def cards(figures: Mapping[str, str]) -> str:
    """Figures side by side, each above its name."""
    items = (f"<li><b>{escape(figure)}</b>{escape(name)}</li>" for name, figure in figures.items())
    return f'<ul class="cards">{"".join(items)}</ul>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), numbers: bool = False) -> str:
    """A table whose first column names the rows; with `numbers` the others are set to the right."""
    of_number = ' class="number"' if numbers else ""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = (escape(cell) for cell in cells)
        return f"<tr><th>{first}</th>" + "".join(f"<{tag}{of_number}>{cell}</{tag}>" for cell in others) + "</tr>"

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(line(row, "td") for row in rows)}</tbody></table></div>'


def embedded(image: Image, alt: str) -> str:
    """An image that is part of the page."""
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img {size} alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'

"""Ranked lists and saliency as HTML, for the report of a run."""

from collections.abc import Iterable

import numpy as np
import PIL.Image
import torch
from matplotlib import colormaps

from cge_fast import data
from cge_fast.analyze.ranked import MARKS, ranked_lists
from cge_fast.analyze.saliency import COLOUR_MAP, evenly_spaced, saliency_maps
from cge_fast.analyze.trained import Trained
from cge_fast.data.images import open_rgb
from cge_fast.page import embedded

QUERIES = 2  # of each group
LOOKED_AT = 6  # images
OPACITY = 0.65  # of a saliency map over its image
KINDS = {True: "right", False: "wrong"}  # classes of matches or not
TALLEST = 256  # pixels of an embedded image: twice what the page shows


def pictures(trained: Trained) -> dict[str, str]:
    """HTML by heading.

    Raises:
        UserError: there is no query or gallery, an image cannot be read, or a feature is not finite.
    """
    with torch.no_grad():
        return {"Ranked lists": lists(trained), "Where the network looks": saliency(trained)}


def shrunk(image: PIL.Image.Image, trained: Trained) -> PIL.Image.Image:
    """The image in the proportions that the network sees, no taller than the page needs."""
    config = trained.config.data
    height = min(TALLEST, max(config.height, TALLEST // 2))
    return image.resize((max(1, height * config.width // config.height), height))


def row(cells: Iterable[tuple[str, str, str]]) -> str:
    """Pictures side by side: of each its class, the <img>, and what stands below."""
    divisions = (f'<div class="{kind}">{image}{text}</div>' for kind, image, text in cells)
    return f'<div class="images">{"".join(divisions)}</div>'


def lists(trained: Trained) -> str:
    """The worst, random and the best queries, each with the first of the gallery and the first match."""
    rows = []
    for group, query, precision, first_match, images in ranked_lists(trained, QUERIES)[1]:
        cells = [("query", embedded(shrunk(open_rgb(query.path), trained), "query"), "query")]
        for rank, image in images:
            is_match = image.identity == query.identity
            picture, text = shrunk(open_rgb(image.path), trained), f"{rank:,} {MARKS[is_match][0]}"
            cells.append((KINDS[is_match], embedded(picture, text), text))
        told = f"<b>{group.capitalize()}</b>: AP <b>{precision:.1%}</b>, first match at rank <b>{first_match:,}</b>"
        rows.append(f"<p>{told}</p>{row(cells)}")
    return "".join(rows)


def saliency(trained: Trained) -> str:
    """Test images, each beside the maximum over the channels of its feature map."""
    images = evenly_spaced(data.read(trained.config.data, ["query"]).query, LOOKED_AT)
    cells = []
    for image, saliency_map in zip(images, saliency_maps(trained, images), strict=True):
        picture = shrunk(open_rgb(image.path), trained)
        low, high = saliency_map.aminmax()
        share = ((saliency_map - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)).numpy()
        smooth = np.asarray(PIL.Image.fromarray(share).resize(picture.size, PIL.Image.Resampling.BILINEAR))
        colours = PIL.Image.fromarray((255 * colormaps[COLOUR_MAP](smooth)[..., :3]).astype(np.uint8))
        over = PIL.Image.blend(picture.convert("L").convert("RGB"), colours, OPACITY)
        cells += [("", embedded(picture, "query"), ""), ("query", embedded(over, "saliency"), "")]
    told = "The feature map's maximum over the channels, from its least (dark) to its largest value (bright)."
    return f"<p>{told}</p>{row(cells)}"

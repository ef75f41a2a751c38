"""Where networks look: the maximum over the channels of the feature map, over the image (the paper's Figure 7)."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from cge_fast import data
from cge_fast.analyze.trained import Trained
from cge_fast.analyze.written import Row, Sheet, Written, told, write
from cge_fast.data import Image
from cge_fast.data.batches import plain_batches
from cge_fast.data.images import open_rgb

GROUPS = 4  # images, each beside its maps, in a row of the picture
PANEL = 1.15  # inches of a panel's width
COLOUR_MAP = "inferno"  # its lightness ascends, so that it can be read in grey


def saliency(checkpoints: Sequence[Trained], output: Path | str, images: int = 8) -> Written:
    """Saliency maps of the same test images by each checkpoint, side by side; saliency.png and saliency.csv.

    The images are `images` of the first checkpoint's queries, evenly spaced. The table has a row for each image and
    checkpoint: where the maximum lies, as shares of the image's width and height from its top left, and which share of
    the saliency each stripe has (of the stripes' means, since stripes may overlap).
    """
    chosen = evenly_spaced(data.read(checkpoints[0].config.data, ["query"]).query, images)
    count = len(chosen)
    maps = [saliency_maps(trained, chosen) for trained in checkpoints]
    stripes = max(trained.config.model.stripes for trained in checkpoints)  # the baselines' settings have them too
    tables = [[described(saliency_map, stripes) for saliency_map in of_all] for of_all in maps]
    rows = [
        {"image": str(image.path), "checkpoint": trained.label, **table[number]}
        for number, image in enumerate(chosen)
        for trained, table in zip(checkpoints, tables, strict=True)
    ]
    means = ([mean(row[f"stripe_{i}"] for row in table) for i in range(1, stripes + 1)] for table in tables)
    texts = (", ".join(f"{share:.1%}" for share in shares) for shares in means)
    summary = f"saliency of the stripes from the top, mean of {count} images: {told(checkpoints, texts)}"
    return write(output, "saliency", drawn(checkpoints, chosen, maps, tables), rows, summary)


def evenly_spaced(images: Sequence[Image], count: int) -> list[Image]:
    """So many of the images, or all."""
    count = min(count, len(images))
    return [images[number * len(images) // count] for number in range(count)]


def saliency_maps(trained: Trained, images: Sequence[Image]) -> Tensor:
    """(images, H', W') float32 on the CPU: the maximum over the channels of the feature maps."""
    config, name = trained.config, f"saliency of {trained.label}"
    batches = plain_batches(images, config.evaluation.batch, config.data, trained.device, name)
    maps = [trained.model.feature_map(batch).amax(dim=1) for batch in batches]
    return torch.cat(maps).float().cpu()


def described(saliency_map: Tensor, stripes: int) -> dict[str, float]:
    """Columns of the table for one map (H', W'): x and y of the maximum's cell, and each stripe's share."""
    height, width = saliency_map.shape
    row, column = divmod(saliency_map.argmax().item(), width)
    means = adaptive_avg_pool2d(saliency_map[None], (stripes, 1)).flatten()
    shares = means / means.sum().clamp(min=torch.finfo(means.dtype).tiny)  # a map without any saliency has shares 0
    by_stripe = {f"stripe_{number}": share for number, share in enumerate(shares.tolist(), start=1)}
    return {"maximum_x": (column + 0.5) / width, "maximum_y": (row + 0.5) / height, **by_stripe}


def drawn(
    checkpoints: Sequence[Trained], images: Sequence[Image], maps: Sequence[Tensor], tables: Sequence[Sequence[Row]]
) -> Figure:
    """Groups of image and maps; each map is scaled to its own range, a cross marks its maximum."""
    config = checkpoints[0].config.data
    size = width, height = PANEL, PANEL * config.height / config.width
    across, step = min(GROUPS, len(images)), 1.05 * width
    group_width, group_height = (1 + len(checkpoints)) * step + 0.25, height + 0.3
    names = ", ".join(trained.label for trained in checkpoints)
    sheet = Sheet(
        max(across * group_width, 4.5),
        math.ceil(len(images) / across) * group_height + 0.7,
        f"Saliency of test images: {names}\neach map from its least (dark) to its largest value (bright, +)",
    )
    for number, image in enumerate(images):
        left, top = number % across * group_width + 0.15, number // across * group_height + 0.9
        picture = open_rgb(image.path).resize((config.width, config.height))
        sheet.picture(np.asarray(picture), left, top, size)
        sheet.axes.text(left + width / 2, top - 0.05, "image", ha="center", fontsize=9)
        for trained, of_all, table in zip(checkpoints, maps, tables, strict=True):
            left += step
            smooth = interpolate(of_all[number, None, None], picture.size[::-1], mode="bilinear")[0, 0]
            sheet.picture(np.asarray(picture.convert("L")), left, top, size, cmap="gray", vmin=0, vmax=255)
            sheet.picture(smooth.numpy(), left, top, size, cmap=COLOUR_MAP, alpha=0.65)
            place = left + table[number]["maximum_x"] * width, top + table[number]["maximum_y"] * height
            sheet.axes.plot(*place, "+", color="white", markersize=11, markeredgewidth=3.5)
            sheet.axes.plot(*place, "+", color="black", markersize=10, markeredgewidth=1.5)
            sheet.axes.text(left + width / 2, top - 0.05, trained.label, ha="center", fontsize=9)
    return sheet.figure

"""Where networks look: the maximum over the channels of the feature map, over the image (the paper's Figure 7)."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from tqdm import tqdm

from cge_fast import data
from cge_fast.analyze.trained import Trained, require_labels_differ
from cge_fast.analyze.written import Written, write
from cge_fast.data import Image
from cge_fast.data.batches import test_loader
from cge_fast.data.images import open_rgb

GROUPS = 4  # images, each beside its maps, in a row of the picture
COLOUR_MAP = "inferno"  # its lightness ascends, so that it can be read in grey


def saliency(checkpoints: Sequence[Trained], output: Path, images: int = 8) -> Written:
    """Saliency maps of the same test images by each checkpoint, side by side; saliency.png and saliency.csv.

    The images are `images` of the first checkpoint's queries, evenly spaced. The table has a row for each image and
    checkpoint: where the maximum lies, as shares of the image's width and height from its top left, and which share of
    the saliency each stripe has (of the stripes' means, since stripes may overlap).

    Raises:
        UserError: a checkpoint has the label of another, or an image cannot be read.
    """
    require_labels_differ(checkpoints)
    queries = data.read(checkpoints[0].config.data).query
    count = min(images, len(queries))
    chosen = [queries[number * len(queries) // count] for number in range(count)]
    maps = [saliency_maps(trained, chosen) for trained in checkpoints]
    stripes = max(trained.config.model.stripes for trained in checkpoints)  # the baselines' settings have them too
    rows = [
        {"image": str(image.path), "checkpoint": trained.label} | described(of_image, stripes)
        for number, image in enumerate(chosen)
        for trained, found in zip(checkpoints, maps, strict=True)
        for of_image in [found[number]]
    ]
    summaries = []
    for trained in checkpoints:
        mine = [row for row in rows if row["checkpoint"] == trained.label]
        means = [sum(row[f"stripe_{i}"] for row in mine) / count for i in range(1, stripes + 1)]
        summaries.append(f"{trained.label}: " + ", ".join(f"{mean:.1%}" for mean in means))
    summary = f"saliency of the stripes from the top, mean of {count} images: " + "; ".join(summaries)
    return write(output, "saliency", drawn(chosen, maps, rows, checkpoints), rows, summary)


def saliency_maps(trained: Trained, images: Sequence[Image]) -> Tensor:
    """(images, H', W') float32 on the CPU: the maximum over the channels of the feature maps."""
    loader = test_loader(images, trained.config.evaluation.batch, trained.config.data)
    bar = tqdm(loader, desc=f"saliency, {trained.label}", unit=" batch", leave=False)
    maps = [trained.network.feature_map(batch.to(trained.device)).amax(dim=1) for batch in bar]
    return torch.cat(maps).float().cpu()


def described(saliency_map: Tensor, stripes: int) -> dict[str, float]:
    """Columns of the table for one map (H', W'): x and y of the maximum's cell, and each stripe's share."""
    height, width = saliency_map.shape
    row, column = divmod(saliency_map.argmax().item(), width)
    means = adaptive_avg_pool2d(saliency_map[None], (stripes, 1)).flatten()
    shares = means / means.sum().clamp(min=torch.finfo(means.dtype).tiny)  # a map without any saliency has shares 0
    return {
        "maximum_x": (column + 0.5) / width,
        "maximum_y": (row + 0.5) / height,
        **{f"stripe_{number}": share for number, share in enumerate(shares.tolist(), start=1)},
    }


def drawn(
    images: Sequence[Image], maps: Sequence[Tensor], rows: Sequence[dict], checkpoints: Sequence[Trained]
) -> Figure:
    """Groups of image and maps; each map is scaled to its own range, a cross marks its maximum."""
    config = checkpoints[0].config.data
    height, width = config.height, config.width
    columns, across = 1 + len(checkpoints), min(GROUPS, len(images))
    down = math.ceil(len(images) / across)
    cell = 1.15  # a panel's width, inches
    # Margins are given, since a layout that matplotlib finds takes seconds for so many panels.
    inches = across * (columns * cell + 0.3), down * (cell * height / width + 0.3) + 0.7
    figure = Figure(figsize=inches)
    names = ", ".join(trained.label for trained in checkpoints)
    figure.suptitle(
        f"Saliency, {config.name}, test images: {names}\n"
        "each map from its least (dark) to its largest value (bright, +)",
        y=1 - 0.1 / inches[1],
        va="top",
    )
    grid = figure.add_gridspec(
        *(down, across),
        left=0.1 / inches[0],
        right=1 - 0.1 / inches[0],
        bottom=0.1 / inches[1],
        top=1 - 0.9 / inches[1],
        wspace=0.3 / (columns * cell),
        hspace=0.3 / (cell * height / width),
    )
    for number, (group, image) in enumerate(zip(grid, images, strict=False)):
        panels = group.subgridspec(1, columns, wspace=0.05).subplots()
        picture = open_rgb(image.path).resize((width, height))
        panels[0].imshow(np.asarray(picture))
        panels[0].set_title("image", fontsize=9)
        described_maps = rows[number * len(checkpoints) : (number + 1) * len(checkpoints)]
        for axes, of_all, row in zip(panels[1:], maps, described_maps, strict=True):
            draw_map(axes, picture, of_all[number], row)
            axes.set_title(row["checkpoint"], fontsize=9)
        for axes in panels:
            axes.set_axis_off()
    return figure


def draw_map(axes: Axes, picture: PIL.Image.Image, saliency_map: Tensor, row: dict) -> None:
    """A map (H', W') over the grey picture, and a cross where `row` says its maximum is."""
    smooth = interpolate(saliency_map[None, None], picture.size[::-1], mode="bilinear")[0, 0]
    axes.imshow(np.asarray(picture.convert("L")), cmap="gray", vmin=0, vmax=255)
    axes.imshow(smooth.numpy(), cmap=COLOUR_MAP, alpha=0.65)
    x, y = row["maximum_x"] * picture.width - 0.5, row["maximum_y"] * picture.height - 0.5
    axes.plot(x, y, "+", color="white", markersize=11, markeredgewidth=3.5)
    axes.plot(x, y, "+", color="black", markersize=10, markeredgewidth=1.5)

"""What stands first in the gallery's ranking for the queries that fare worst."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from cge_fast import data
from cge_fast.analyze.trained import Trained
from cge_fast.analyze.written import Sheet, Written, write
from cge_fast.data import Image
from cge_fast.data.images import open_rgb
from cge_fast.errors import UserError
from cge_fast.evaluation import ranking
from cge_fast.evaluation.features import embed
from cge_fast.evaluation.reranking import reranked_distances

DistancesOf = Callable[[slice], Tensor]
SHOWN = 10  # gallery images of a query
WIDTH = 1.0  # inches of an image
MARKS = {True: ("✓", "#1a7f37", "-"), False: ("✗", "#d1242f", "--")}  # match or not: sign, frame's colour and line


class Features(NamedTuple):
    """Of some images; the fields are the arguments of `evaluate_ranking`."""

    features: Tensor  # (images, C) float32
    identities: Tensor  # (images,) int64
    cameras: Tensor  # (images,) int64


def ranked(trained: Trained, output: Path | str, queries: int = 8) -> Written:
    """The first gallery images, without junk, of the queries of least average precision; ranked.png and ranked.csv.

    The protocol is `evaluate_ranking`'s, with the checkpoint's settings of the evaluation. Queries without a match are
    left out; equal precisions stand in the order of the queries.
    """
    config = trained.config
    reid_set = data.read(config.data, ["query", "gallery"])
    query, gallery = (features(trained, name, getattr(reid_set, name)) for name in ("query", "gallery"))
    if config.evaluation.rerank:
        distances_of = reranked_distances(query.features, gallery.features, config.evaluation.metric, progress=True)
    else:
        distances_of = plain_distances(query, gallery, config.evaluation.metric)
    try:
        retrieval = ranking.evaluate_distances(distances_of, *query[1:], *gallery[1:], progress=True)
    except ValueError as error:
        raise UserError(f"data: {error}") from error
    precisions = retrieval.average_precisions
    worst = precisions.argsort(stable=True)[: min(queries, retrieval.queries)]  # NaN, no match, stands last
    lists, rows = [], []
    for index in worst.tolist():
        of, average_precision = reid_set.query[index], precisions[index].item()
        images = [reid_set.gallery[place] for place in first_images(query, gallery, distances_of, index)]
        lists.append((of, average_precision, images))
        first = {"query": str(of.path), "query_identity": of.identity, "query_camera": of.camera}
        first["average_precision"] = average_precision
        for rank, image in enumerate(images, start=1):
            ranked_image = {"rank": rank, "image": str(image.path), "identity": image.identity, "camera": image.camera}
            rows.append({**first, **ranked_image, "correct": image.identity == of.identity})
    summary = (
        f"{trained.label}: mAP {retrieval.mAP:.1%} of {retrieval.queries} queries, the worst "
        f"{len(worst)} have AP {precisions[worst[0]]:.1%} to {precisions[worst[-1]]:.1%}"
    )
    return write(output, "ranked", drawn(trained, lists), rows, summary)


def features(trained: Trained, name: str, images: list[Image]) -> Features:
    """What evaluation compares, of the query or the gallery; UserError if a feature is not finite."""
    compared = embed(trained.model, images, trained.config.data, trained.config.evaluation, name)
    if not compared.isfinite().all():
        raise UserError(f"checkpoint {trained.folder}: the feature of a {name} image is not finite")
    labels = torch.tensor([(image.identity, image.camera) for image in images], device=compared.device)
    return Features(compared, *labels.unbind(dim=1))


def plain_distances(query: Features, gallery: Features, metric: Literal["cosine", "euclidean"]) -> DistancesOf:
    """A function that gives the distances (rows, G) of a slice of the queries."""
    return lambda chunk: ranking.distances(query.features[chunk], gallery.features, metric)


def first_images(query: Features, gallery: Features, distances_of: DistancesOf, index: int) -> list[int]:
    """Gallery indices of the first images of one query, without junk; equal distances by index."""
    chunk = slice(index, index + 1)
    distance = distances_of(chunk)
    ranking.match_ranks(distance, query.identities[chunk], query.cameras[chunk], *gallery[1:])  # writes NaN for junk
    row = distance[0]
    first = ranking.order_keys(row, torch.arange(len(row), device=row.device)).argsort()[:SHOWN]
    return first[~row[first].isnan()].tolist()


def drawn(trained: Trained, lists: Sequence[tuple[Image, float, Sequence[Image]]]) -> Figure:
    """A row for each query: the query with its AP, then the gallery images, framed and marked as matches or not."""
    config = trained.config.data
    size = width, height = WIDTH, WIDTH * config.height / config.width
    sheet = Sheet(
        (SHOWN + 1) * width * 1.08 + 0.5,
        len(lists) * (height + 0.3) + 0.5,
        f"{trained.label}: queries of least average precision, and the first {SHOWN} of the gallery",
    )
    for number, (query, precision, images) in enumerate(lists):
        top = 0.7 + number * (height + 0.3)
        sheet.axes.text(0.3, top + height / 2, f"AP {precision:.1%}", rotation=90, ha="right", va="center", fontsize=11)
        for rank, image in enumerate((query, *images)):
            left = 0.4 + rank * width * 1.08
            mark, colour, line = MARKS[image.identity == query.identity]
            pixels = open_rgb(image.path).resize((config.width, config.height))
            sheet.picture(np.asarray(pixels), left, top, size)
            if rank:
                sheet.axes.add_patch(Rectangle((left, top), *size, fill=False, ec=colour, lw=3, linestyle=line))
            text, colour = (f"{rank} {mark}", colour) if rank else ("query", "black")
            sheet.axes.text(left + width / 2, top - 0.06, text, ha="center", fontsize=10, color=colour)
    return sheet.figure

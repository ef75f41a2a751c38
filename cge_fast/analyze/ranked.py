"""What stands first in the gallery's ranking for the queries that fare worst."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cge_fast import data
from cge_fast.analyze.rows import Shown, rows_of_images
from cge_fast.analyze.trained import Trained
from cge_fast.analyze.written import Written, write
from cge_fast.data import Image
from cge_fast.errors import UserError
from cge_fast.evaluation import ranking
from cge_fast.evaluation.features import embed
from cge_fast.evaluation.reranking import reranked_distances

DistancesOf = Callable[[slice], Tensor]
SHOWN = 10  # gallery images of a query
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
        first = {"query": str(of.path), "query_identity": of.labels[0], "query_camera": of.labels[1]}
        first["average_precision"] = average_precision
        for rank, image in enumerate(images, start=1):
            identity, camera = image.labels
            ranked_image = {"rank": rank, "image": str(image.path), "identity": identity, "camera": camera}
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
    first = ranking.nearest_images(distance, SHOWN)[0]
    return first[~distance[0, first].isnan()].tolist()


def drawn(trained: Trained, lists: Sequence[tuple[Image, float, Sequence[Image]]]) -> Figure:
    """A row for each query: the query with its AP, then the gallery images, framed and marked as matches or not."""
    rows = []
    for query, precision, images in lists:
        row = [Shown(query.path, f"query {query.identity_name or ''}".strip())]
        for rank, image in enumerate(images, start=1):
            mark, *how = MARKS[image.identity == query.identity]
            row.append(Shown(image.path, f"{rank} {mark} {image.identity_name or ''}".strip(), *how))
        rows.append((f"AP {precision:.1%}", row))
    title = f"{trained.label}: queries of least average precision, and the first {SHOWN} of the gallery"
    return rows_of_images(rows, trained.config.data, title)

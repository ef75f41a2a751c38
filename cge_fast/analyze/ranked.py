"""What stands first in the gallery's ranking for the queries that fare worst, for some of all, and for the best."""

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
MARKS = {True: ("✓", "#1a7f37", 4), False: ("✗", "#d1242f", 1.5)}  # match or not: sign, frame's colour and points
GROUPS = "worst", "random", "best"


class Features(NamedTuple):
    """Of some images; the fields are the arguments of `evaluate_ranking`."""

    features: Tensor  # (images, C) float32
    identities: Tensor  # (images,) int64
    cameras: Tensor  # (images,) int64


class RankedList(NamedTuple):
    """A query and what is found for it."""

    group: str  # of GROUPS
    query: Image
    average_precision: float
    first_match: int  # rank
    images: list[tuple[int, Image]]  # ranks and gallery images: the first ones, and the first match if it comes later


def ranked(trained: Trained, output: Path | str, queries: int = 3) -> Written:
    """The first gallery images, without junk, and the first match of some queries; ranked.png and ranked.csv.

    The protocol is `evaluate_ranking`'s, with the checkpoint's settings of the evaluation. There are `queries` of least
    and of most average precision and as many others at random, the same each time; those without a match are left out,
    and equal precisions stand in the order of the queries.
    """
    retrieval, lists = ranked_lists(trained, queries)
    rows = []
    for group, of, average_precision, first_match, images in lists:
        first = {"group": group, "query": str(of.path), "query_identity": of.labels[0], "query_camera": of.labels[1]}
        first |= {"average_precision": average_precision, "first_match": first_match}
        for rank, image in images:
            identity, camera = image.labels
            ranked_image = {"rank": rank, "image": str(image.path), "identity": identity, "camera": camera}
            rows.append({**first, **ranked_image, "correct": image.identity == of.identity})
    summary = f"{trained.label}: mAP {retrieval.mAP:.1%} of {retrieval.queries} queries; " + ", ".join(
        f"{group} AP {' '.join(f'{one.average_precision:.1%}' for one in lists if one.group == group)}"
        for group in dict.fromkeys(one.group for one in lists)
    )
    return write(output, "ranked", drawn(trained, lists), rows, summary)


def ranked_lists(trained: Trained, queries: int) -> tuple[ranking.Retrieval, list[RankedList]]:
    """The evaluation, and the lists of so many queries of each group, by their precision in each.

    Raises:
        UserError: a feature is not finite, or no query has a match.
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
    lists = []
    for group, indices in zip(GROUPS, groups(retrieval, queries), strict=True):
        for index in indices:
            first_match, places = first_places(query, gallery, distances_of, index)
            images = [(rank, reid_set.gallery[place]) for rank, place in places.items()]
            precision = retrieval.average_precisions[index].item()
            lists.append(RankedList(group, reid_set.query[index], precision, first_match, images))
    return retrieval, lists


def groups(retrieval: ranking.Retrieval, queries: int) -> tuple[list[int], list[int], list[int]]:
    """Indices of the worst, of random and of the best queries, none in two groups, each by ascending precision."""
    by_precision = retrieval.average_precisions.argsort(stable=True)[
        : retrieval.queries
    ].tolist()  # NaN, no match, last
    worst, others = by_precision[:queries], by_precision[queries:]
    split = max(0, len(others) - queries)
    chosen = torch.randperm(split, generator=torch.Generator().manual_seed(0))[:queries].sort().values
    return worst, [others[place] for place in chosen.tolist()], others[split:]


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


def first_places(
    query: Features, gallery: Features, distances_of: DistancesOf, index: int
) -> tuple[int, dict[int, int]]:
    """Of one query the first match's rank, and gallery indices by rank: of the first images and of that match.

    Ranks are without junk; equal distances rank by index.
    """
    chunk = slice(index, index + 1)
    distance = distances_of(chunk)
    match_ranks, _ = ranking.match_ranks(  # writes NaN for junk
        distance, query.identities[chunk], query.cameras[chunk], *gallery[1:]
    )
    first_match = int(match_ranks[0, 0])
    order = ranking.nearest_images(distance, max(SHOWN, first_match))[0]
    order = order[~distance[0, order].isnan()].tolist()
    ranks = sorted({*range(1, min(SHOWN, len(order)) + 1), first_match})
    return first_match, {rank: order[rank - 1] for rank in ranks}


def drawn(trained: Trained, lists: Sequence[RankedList]) -> Figure:
    """A row for each query: the query with its AP, then the gallery images, framed and marked as matches or not."""
    rows = []
    for group, query, precision, first_match, images in lists:
        row = [Shown(query.path, f"query {query.identity_name or ''}".strip())]
        for rank, image in images:
            mark, *how = MARKS[image.identity == query.identity]
            gap = 0.1 if rank == 1 or rank > SHOWN else 0
            row.append(Shown(image.path, f"{rank:,} {mark} {image.identity_name or ''}".strip(), *how, gap))
        rows.append((f"{group}\nAP {precision:.1%}\nfirst match\nat rank {first_match:,}", row))
    title = f"{trained.label}: queries, the first {SHOWN} of the gallery, and the first match where it comes later"
    return rows_of_images(rows, trained.config.data, title)

"""Market-1501's evaluation protocol: mAP, mINP and the cumulative matching curve, in chunks of queries."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cge_fast.progress import progress as progress_bar

CURVE_RANKS = 50
CHUNK_DISTANCES = 2**25  # distances held at a time, of some queries to the whole gallery; they take about 6 bytes each
BLOCK_IMAGES = 1024  # gallery images whose float64 features, or whose keys, are held at a time
BEHIND_ALL = torch.iinfo(torch.int64).max  # a key greater than any image's


@dataclass(frozen=True)
class Retrieval:
    """How well queries find their identity in the gallery; shares between 0 and 1."""

    mAP: float  # noqa: N815 - the field's name
    mINP: float  # noqa: N815
    cmc: tuple[float, ...]  # cmc[k-1]: share of queries with a match among the first k
    queries: int  # how many were counted
    skipped: int  # queries without any match in the gallery, which are left out of every mean
    average_precisions: Tensor = field(compare=False, repr=False)  # (Q,) float64 on the CPU, NaN without a match

    def rank(self, k: int) -> float:
        """Share of queries with a match among the first k, k = 1..50."""
        return self.cmc[k - 1]

    def row(self) -> dict[str, float]:
        """The figures that tables have: mAP, rank-1, -5 and -10, mINP."""
        ranks = {f"rank{k}": self.rank(k) for k in (1, 5, 10)}
        return {"mAP": self.mAP, **ranks, "mINP": self.mINP}


def distances(query: Tensor, gallery: Tensor, metric: Literal["cosine", "euclidean"]) -> Tensor:
    """(Q, G) float32 distances that rank as the metric does: minus the cosine, or half the squared distance.

    They are computed in float64: the matmul form of the squared distance cancels, and equal rows of the gallery must
    get equal distances whatever tile of the product they fall into.
    """
    result = torch.empty(len(query), len(gallery), dtype=torch.float32, device=query.device)
    query = normalize(query.double()) if metric == "cosine" else query.double()
    half_squares = query.square().sum(dim=1, keepdim=True) / 2
    for images, columns in zip(gallery.split(BLOCK_IMAGES), result.split(BLOCK_IMAGES, dim=1), strict=True):
        images = normalize(images.double()) if metric == "cosine" else images.double()
        products = query @ images.T
        if metric == "cosine":
            columns.copy_(products.neg_())
        else:
            columns.copy_((half_squares + images.square().sum(dim=1) / 2).sub_(products))
    return result


def order_keys(distance: Tensor, index: Tensor) -> Tensor:
    """int64 that order as the float32 distances do, and equal distances by index; NaN comes behind infinity."""
    bits = (distance + 0.0).view(torch.int32)  # the sum makes -0.0 a 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # a float's bits ascend with it, but those of negative ones descend
    return bits.long().mul_(2**32).add_(index)


def nearest_images(distance: Tensor, count: int) -> Tensor:
    """Indices (Q, min(count, G)) int64 of each row's least distances (Q, G) float32, in order; equal ones by index."""
    best = torch.empty(len(distance), 0, dtype=torch.int64, device=distance.device)
    indices = torch.arange(distance.shape[1], device=distance.device)
    for part, index in zip(distance.split(BLOCK_IMAGES, dim=1), indices.split(BLOCK_IMAGES), strict=True):
        keys = torch.cat([best, order_keys(part, index)], dim=1)
        best = keys.topk(min(count, keys.shape[1]), largest=False, sorted=True).values
    return best & 0xFFFFFFFF  # a key's lower half is the index


def match_ranks(
    distance: Tensor, identities: Tensor, cameras: Tensor, gallery_identities: Tensor, gallery_cameras: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranks (Q, M) int64 of each query's matches, ascending, and which of them are no padding.

    Args:
        distance: (Q, G) float32; that of junk is overwritten.
        identities, cameras: (Q,); gallery_identities, gallery_cameras (G,).
    """
    query, image = (identities[:, None] == gallery_identities).nonzero(as_tuple=True)
    junk = cameras[query] == gallery_cameras[image]
    distance[query, image] = distance[query, image].masked_fill(junk, torch.nan)

    # Matches are few: only their keys are sorted, those of a query in a row of its own, padded.
    count = query.bincount(minlength=len(distance))
    column = torch.arange(len(query), device=query.device) - (count.cumsum(0) - count)[query]
    match = torch.full((len(distance), max([1, *count.tolist()])), BEHIND_ALL, device=query.device)
    match[query, column] = order_keys(distance[query, image], image).masked_fill(junk, BEHIND_ALL)
    match = match.sort(dim=1).values

    # A rank is how many images are up to the match: they are counted from one match to the next.
    images = match.new_zeros(len(match), match.shape[1] + 1)
    indices = torch.arange(distance.shape[1], device=distance.device)
    for part, index in zip(distance.split(BLOCK_IMAGES, dim=1), indices.split(BLOCK_IMAGES), strict=True):
        place = torch.searchsorted(match, order_keys(part, index))
        images.scatter_add_(1, place, images.new_ones(()).expand_as(place))
    return images.cumsum(dim=1)[:, :-1], match < BEHIND_ALL


def chunk_rows(images: int) -> int:
    """How many rows of distances to so many images are held at a time."""
    return max(1, CHUNK_DISTANCES // max(1, images))


def require_finite(**features: Tensor) -> None:
    """Raises ValueError if features are NaN or infinite."""
    for name, values in features.items():
        if not all(chunk.isfinite().all() for chunk in values.split(1024)):
            raise ValueError(f"{name} must be finite, got NaN or infinity")


@torch.no_grad()
def evaluate_ranking(
    query_features: Tensor,
    query_identities: Tensor,
    query_cameras: Tensor,
    gallery_features: Tensor,
    gallery_identities: Tensor,
    gallery_cameras: Tensor,
    metric: Literal["cosine", "euclidean"] = "cosine",
    progress: bool = False,
) -> Retrieval:
    """Ranks the gallery for every query by the features' distance and averages over queries: `evaluate_distances`.

    Args:
        query_features: (Q, C), floating; gallery_features (G, C).
        query_identities, query_cameras: (Q,) integer; gallery_identities, gallery_cameras (G,).
        metric: distance of two features.
        progress: draw a progress bar.

    Raises:
        ValueError: a feature is not finite, or no query has a match.
    """
    require_finite(query_features=query_features, gallery_features=gallery_features)
    return evaluate_distances(
        lambda queries: distances(query_features[queries], gallery_features, metric),
        query_identities,
        query_cameras,
        gallery_identities,
        gallery_cameras,
        progress,
    )


@torch.no_grad()
def evaluate_distances(
    distances_of: Callable[[slice], Tensor],
    query_identities: Tensor,
    query_cameras: Tensor,
    gallery_identities: Tensor,
    gallery_cameras: Tensor,
    progress: bool = False,
) -> Retrieval:
    """Ranks the gallery for every query by distances that are asked for a chunk of queries at a time.

    Gallery images of the query's identity from the query's camera are junk and taken out. AP is the mean of the
    precisions at the matches; INP is matches / rank of the last match. Equal distances rank by gallery index. Memory
    does not grow with queries x gallery.

    Args:
        distances_of: gives the distances (rows, G) float32, not NaN, of a slice of the queries; they are overwritten.
        query_identities, query_cameras: (Q,) integer; gallery_identities, gallery_cameras (G,).
        progress: draw a progress bar.

    Raises:
        ValueError: no query has a match.
    """
    queries, rows = len(query_identities), chunk_rows(len(gallery_identities))
    average_precisions, penalties, first_ranks, counted = [], [], [], []
    with progress_bar(what="ranking", unit="queries", total=queries, show=progress) as bar:
        for start in range(0, queries, rows):
            chunk = slice(start, min(start + rows, queries))
            rank, is_match = match_ranks(
                distances_of(chunk),
                query_identities[chunk],
                query_cameras[chunk],
                gallery_identities,
                gallery_cameras,
            )
            matches = is_match.sum(dim=1).double()
            number = torch.arange(1, rank.shape[1] + 1, dtype=torch.float64, device=rank.device)
            average_precisions.append((number / rank).where(is_match, 0).sum(dim=1) / matches)
            penalties.append(matches / rank.where(is_match, 0).amax(dim=1))
            first_ranks.append(rank[:, 0])
            counted.append(matches > 0)
            bar.update(len(rank))
    has_match, precisions = torch.cat(counted), torch.cat(average_precisions)
    first = torch.cat(first_ranks)[has_match]
    if len(first) == 0:
        raise ValueError("no query has a match of another camera in the gallery, so there is nothing to average")
    return Retrieval(
        mAP=precisions[has_match].mean().item(),
        mINP=torch.cat(penalties)[has_match].mean().item(),
        cmc=tuple((first <= k).double().mean().item() for k in range(1, CURVE_RANKS + 1)),
        queries=len(first),
        skipped=queries - len(first),
        average_precisions=precisions.cpu(),
    )

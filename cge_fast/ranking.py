"""Market-1501's evaluation protocol: mAP, mINP and the cumulative matching curve, in chunks of queries."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

CURVE_RANKS = 50
CHUNK_DISTANCES = 2**22  # distances held at a time; the ranking of a chunk takes about 40 bytes for each


@dataclass(frozen=True)
class Retrieval:
    """How well queries find their identity in the gallery; shares between 0 and 1."""

    mAP: float  # noqa: N815 - the field's name
    mINP: float  # noqa: N815
    cmc: tuple[float, ...]  # cmc[k-1]: share of queries with a match among the first k
    queries: int  # how many were counted
    skipped: int  # queries without any match in the gallery, which are left out of every mean

    def rank(self, k: int) -> float:
        """Share of queries with a match among the first k, k = 1..50."""
        return self.cmc[k - 1]


def distances(query: Tensor, gallery: Tensor, metric: Literal["cosine", "euclidean"]) -> Tensor:
    """(Q, G) float32 distances that rank as the metric does: minus the cosine, or half the squared distance.

    They are computed in float64 (cosine expects normalised features): the matmul form of the squared distance cancels,
    and equal rows of the gallery must get equal distances whatever tile of the product they fall into.
    """
    products = query @ gallery.T
    if metric == "cosine":
        return products.neg_().float()
    squares = (query.square().sum(dim=1) / 2)[:, None] + gallery.square().sum(dim=1) / 2
    return squares.sub_(products).float()


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
    """Ranks the gallery for every query and averages over queries.

    Gallery images of the query's identity from the query's camera are junk and taken out. AP is the mean of the
    precisions at the matches; INP is matches / rank of the last match. Equal distances rank by gallery index. Memory
    does not grow with queries x gallery.

    Args:
        query_features: (Q, C), floating; gallery_features (G, C).
        query_identities, query_cameras: (Q,) integer; gallery_identities, gallery_cameras (G,).
        metric: distance of two features.
        progress: draw a progress bar.

    Raises:
        ValueError: a feature is not finite, or no query has a match.
    """
    for name, features in (("query_features", query_features), ("gallery_features", gallery_features)):
        if not all(chunk.isfinite().all() for chunk in features.split(4096)):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    query_features, gallery_features = query_features.double(), gallery_features.double()
    if metric == "cosine":
        query_features, gallery_features = normalize(query_features), normalize(gallery_features)
    rows = max(1, CHUNK_DISTANCES // max(1, len(gallery_features)))
    average_precisions, penalties, first_ranks = [], [], []
    chunks = zip(query_features.split(rows), query_identities.split(rows), query_cameras.split(rows), strict=True)
    with tqdm(total=len(query_features), desc="ranking", unit=" query", disable=not progress, leave=False) as bar:
        for features, identities, cameras in chunks:
            order = distances(features, gallery_features, metric).sort(dim=1, stable=True).indices
            same_identity = gallery_identities[order] == identities[:, None]
            junk = same_identity & (gallery_cameras[order] == cameras[:, None])
            match = same_identity & ~junk
            # Matches are few: from here on work with their positions (query, place in the order) alone.
            query, place = match.nonzero(as_tuple=True)
            rank = (~junk).cumsum(dim=1, dtype=torch.int32)[query, place]
            matches = match.sum(dim=1)
            start = matches.cumsum(0) - matches
            number = torch.arange(1, len(query) + 1, device=query.device) - start[query]
            has_match = matches > 0
            counts = matches[has_match]
            precision_sums = torch.zeros(len(features), dtype=torch.float64, device=query.device)
            precision_sums.index_add_(0, query, number.double() / rank)
            average_precisions.append(precision_sums[has_match] / counts)
            first_ranks.append(rank[start[has_match]])
            penalties.append(counts.double() / rank[start[has_match] + counts - 1])
            bar.update(len(features))
    first = torch.cat(first_ranks)
    if len(first) == 0:
        raise ValueError("no query has a match of another camera in the gallery, so there is nothing to average")
    return Retrieval(
        mAP=torch.cat(average_precisions).mean().item(),
        mINP=torch.cat(penalties).mean().item(),
        cmc=tuple((first <= k).double().mean().item() for k in range(1, CURVE_RANKS + 1)),
        queries=len(first),
        skipped=len(query_features) - len(first),
    )

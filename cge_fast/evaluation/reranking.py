"""Re-ranking with k-reciprocal encoding (Zhong, Zheng, Cao, Li: CVPR 2017), in chunks and with sparse encodings.

As in the published code, of N images, queries first, then the gallery:

- d(i, j): squared Euclidean distance, divided by the largest that image i has to any image. With the metric cosine
  features are of unit length. The nearest of an image begin with itself; equal distances order by index.
- R(i, k): those of i's k + 1 nearest that have i among their own k + 1 nearest.
- R*(i): R(i, k1), and every R(c, k1 / 2) with c in R(i, k1) of which more than two thirds lie in R(i, k1).
- V[i, j]: exp(-d(i, j)) for j in R*(i), else 0, divided by the row's sum; then the mean of the rows of i's k2 nearest.
- Jaccard distance of query q and gallery image g: 1 - s / (2 - s), s = sum over j of min(V[q, j], V[g, j]).
- Final distance: (1 - lambda) * Jaccard distance + lambda * d(q, g).

Memory for C channels, V with Z entries that are not zero, and CHUNK_DISTANCES distances at a time, bytes:
4 N C (features side by side) + 16 N (k1 + 1) + 100 Z + 8 CHUNK_DISTANCES. Z is at most
N k2 (k1 + 1) (k1 / 2 + 2), and on random clusters 25 to 100 N. Nothing has N x N or Q x G entries.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from cge_fast.evaluation.ranking import (
    BLOCK_IMAGES,
    Retrieval,
    chunk_rows,
    distances,
    evaluate_distances,
    nearest_images,
    require_finite,
)
from cge_fast.progress import progress as progress_bar

K1, K2, LAMBDA = 20, 6, 0.3  # the paper's
BLOCK_ENTRIES = 4096  # entries of encodings, or pairs of images, that are worked on at a time
NOBODY = -1


@torch.no_grad()
def evaluate_reranking(
    query_features: Tensor,
    query_identities: Tensor,
    query_cameras: Tensor,
    gallery_features: Tensor,
    gallery_identities: Tensor,
    gallery_cameras: Tensor,
    metric: Literal["cosine", "euclidean"] = "cosine",
    progress: bool = False,
) -> Retrieval:
    """`evaluate_ranking` by the re-ranked distances; arguments and errors are the same."""
    require_finite(query_features=query_features, gallery_features=gallery_features)
    return evaluate_distances(
        reranked_distances(query_features, gallery_features, metric, progress=progress),
        query_identities,
        query_cameras,
        gallery_identities,
        gallery_cameras,
        progress,
    )


@torch.no_grad()
def reranked_distances(
    query_features: Tensor,
    gallery_features: Tensor,
    metric: Literal["cosine", "euclidean"],
    k1: int = K1,
    k2: int = K2,
    original_share: float = LAMBDA,
    progress: bool = False,
) -> Callable[[slice], Tensor]:
    """A function that gives the final distances (rows, G) float32 of a slice of the queries.

    Args:
        query_features: (Q, C), floating; gallery_features (G, C).
        metric: distance of two features.
        k1: neighbours whose reciprocity is looked at; k2: neighbours, the image itself among them, whose encodings are
            averaged. Of fewer images all are taken.
        original_share: lambda, the share of the original distance.
        progress: draw a progress bar.
    """
    queries = len(query_features)
    features = torch.cat([query_features, gallery_features])
    nearest, farthest = neighbours(features, metric, max(k1 + 1, k2), progress)
    row, column = reciprocal_pairs(nearest[:, : k1 + 1], k1)
    weight = (-pair_distances(features, row, column, metric) / farthest[row]).exp()
    weight /= weight.new_zeros(len(features)).index_add_(0, row, weight)[row]
    row, column, weight = averaged(nearest[:, :k2], row, column, weight)

    # What is left of the encodings: the queries' by row, and for each column the gallery images that have it.
    first_of_query = torch.searchsorted(row, torch.arange(queries + 1, device=row.device)).tolist()
    in_gallery = (row >= queries).nonzero().squeeze(1)
    in_gallery = in_gallery[column[in_gallery].argsort(stable=True)]
    image, image_weight = row[in_gallery] - queries, weight[in_gallery]
    first_of_column = torch.searchsorted(column[in_gallery], torch.arange(len(features) + 1, device=row.device))

    def distances_of(chunk: slice) -> Tensor:
        result = half_squares(query_features[chunk], gallery_features, metric)
        result.mul_(original_share / farthest[chunk, None])
        overlap = torch.zeros_like(result)
        entries = slice(first_of_query[chunk.start], first_of_query[chunk.stop])
        blocks = (values[entries].split(BLOCK_ENTRIES) for values in (row, column, weight))
        for query, shared, query_weight in zip(*blocks, strict=True):
            entry, place = expand(first_of_column[shared], first_of_column[shared + 1])
            common = torch.minimum(query_weight[entry], image_weight[place])
            overlap.index_put_((query[entry] - chunk.start, image[place]), common, accumulate=True)
        # 1 - s / (2 - s) = 2 (1 + 1 / (s - 2)), which needs no more memory.
        return result.add_(overlap.sub_(2).reciprocal_().add_(1), alpha=2 * (1 - original_share))

    return distances_of


def half_squares(first: Tensor, second: Tensor, metric: Literal["cosine", "euclidean"]) -> Tensor:
    """(A, B) float32 halves of squared distances of features (A, C) and (B, C); the half cancels in d."""
    result = distances(first, second, metric)
    return result.add_(1) if metric == "cosine" else result


def neighbours(
    features: Tensor, metric: Literal["cosine", "euclidean"], count: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Indices (N, min(count, N)) int64 of each image's nearest, in order, and half the square (N,) to its farthest."""
    nearest, farthest = [], []
    with progress_bar(what="finding neighbours", unit="images", total=len(features), show=progress) as bar:
        for images in features.split(chunk_rows(len(features))):
            distance = half_squares(images, features, metric)
            nearest.append(nearest_images(distance, count))
            farthest.append(distance.amax(dim=1))
            bar.update(len(images))
    # Of images that are all the same every distance is zero, not 0 / 0.
    return torch.cat(nearest), torch.cat(farthest).clamp(min=torch.finfo(torch.float32).tiny)


def reciprocal(nearest: Tensor) -> Tensor:
    """(N, k) bool: which of an image's k nearest have it among their own k nearest."""
    images = torch.arange(len(nearest), device=nearest.device)
    return torch.cat(
        [
            (nearest[theirs] == image[:, None, None]).any(dim=2)
            for image, theirs in zip(images.split(BLOCK_IMAGES), nearest.split(BLOCK_IMAGES), strict=True)
        ]
    )


def reciprocal_pairs(nearest: Tensor, k1: int) -> tuple[Tensor, Tensor]:
    """Every image i and each j in R*(i): two int64 (P,), ascending by i, then by j.

    nearest: (N, k1 + 1) int64, or fewer columns if there are fewer images.
    """
    closest = nearest[:, : round(k1 / 2) + 1]
    near_sets = nearest.where(reciprocal(nearest), NOBODY)
    close_sets = closest.where(reciprocal(closest), NOBODY)
    pairs = []
    for images in torch.arange(len(nearest), device=nearest.device).split(BLOCK_IMAGES):
        own = near_sets[images]  # (rows, k1 + 1)
        candidates = close_sets[own].where((own != NOBODY)[:, :, None], NOBODY)  # (rows, k1 + 1, k1 / 2 + 1)
        there = candidates != NOBODY
        shared = torch.stack([(part[:, :, None] == own[:, None]).any(dim=2) for part in candidates.unbind(dim=1)], 1)
        joins = 3 * (shared & there).sum(dim=2) > 2 * there.sum(dim=2)
        members = torch.cat([own, candidates.where(joins[:, :, None], NOBODY).flatten(1)], dim=1).sort(dim=1).values
        new = members != NOBODY
        new[:, 1:] &= members[:, 1:] != members[:, :-1]
        row, place = new.nonzero(as_tuple=True)
        pairs.append(torch.stack([images[row], members[row, place]]))
    return tuple(torch.cat(pairs, dim=1))


def pair_distances(features: Tensor, first: Tensor, second: Tensor, metric: Literal["cosine", "euclidean"]) -> Tensor:
    """(P,) float32 halves of squared distances of the pairs of images first (P,), second (P,)."""
    result = []
    for pair in torch.stack([first, second]).split(BLOCK_ENTRIES, dim=1):
        a, b = features[pair].double()
        if metric == "cosine":
            a, b = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)
        result.append(((a - b).square().sum(dim=1) / 2).float())
    return torch.cat(result)


def averaged(nearest: Tensor, row: Tensor, column: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and weight (Z,) of the means of the encodings of each image's nearest (N, k2), ascending.

    row, column, weight: (P,), the encodings' entries that are not zero, ascending.
    """
    images, count = nearest.shape
    first = torch.searchsorted(row, torch.arange(images + 1, device=row.device))
    keys, means = [], []
    for start in range(0, images, BLOCK_IMAGES):
        theirs = nearest[start : start + BLOCK_IMAGES].flatten()
        entry, place = expand(first[theirs], first[theirs + 1])
        key, same = (column[place] + (start + entry // count) * images).unique(return_inverse=True)
        keys.append(key)
        means.append(weight.new_zeros(len(key)).index_add_(0, same, weight[place] / count))
    key = torch.cat(keys)
    return key // images, key % images, torch.cat(means)


def expand(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """For ranges start (E,) .. stop (E,): of every place in them, which range it is in, and the place."""
    length = stop - start
    entry = torch.arange(len(length), device=length.device).repeat_interleave(length)
    offset = start - (length.cumsum(0) - length)
    return entry, torch.arange(len(entry), device=length.device) + offset[entry]

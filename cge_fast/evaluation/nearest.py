"""The nearest gallery images of queries, exactly; by faiss if it is installed."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cge_fast.evaluation.ranking import chunk_rows, distances, nearest_images, order_keys, require_finite


@torch.no_grad()
def nearest(
    query: Tensor, gallery: Tensor, metric: Literal["cosine", "euclidean"], count: int
) -> tuple[Tensor, Tensor]:
    """Distances (Q, k) float32, as `ranking.distances` has them, and gallery indices (Q, k) int64; k = min(count, G).

    In order; equal distances by index. On the CPU faiss, if it is installed, chooses the k by float32 products, so that
    of images whose distances differ by rounding alone others may be the last.

    Args:
        query: (Q, C), floating; gallery (G, C).
        metric: distance of two features.
        count: how many.

    Raises:
        ValueError: a feature is not finite.
    """
    require_finite(query=query, gallery=gallery)
    count = min(count, len(gallery))
    index = None if gallery.is_cuda else by_faiss(query, gallery, metric, count)
    if index is None:
        parts = query.split(chunk_rows(len(gallery)))
        index = torch.cat([nearest_images(distances(part, gallery, metric), count) for part in parts])
    of_query = [distances(one[None], gallery[row], metric) for one, row in zip(query, index, strict=True)]
    distance = torch.cat([gallery.new_empty(0, count, dtype=torch.float32), *of_query])
    order = order_keys(distance, index).argsort(dim=1)
    return distance.gather(1, order), index.gather(1, order)


def by_faiss(query: Tensor, gallery: Tensor, metric: Literal["cosine", "euclidean"], count: int) -> Tensor | None:
    """Indices (Q, count) int64, in no certain order; None without faiss."""
    try:
        import faiss
    except ImportError:
        return None
    if metric == "cosine":
        query, gallery = normalize(query), normalize(gallery)
    index = (faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2)(gallery.shape[1])
    index.add(gallery.float().contiguous().numpy())
    return torch.from_numpy(index.search(query.float().contiguous().numpy(), count)[1])

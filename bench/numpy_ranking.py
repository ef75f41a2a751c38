"""CMC and mAP in plain NumPy, query by query over the whole distance matrix: what bench/evaluate.py compares with."""

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm


def numpy_ranking(
    query_features: NDArray,
    query_identities: NDArray,
    query_cameras: NDArray,
    gallery_features: NDArray,
    gallery_identities: NDArray,
    gallery_cameras: NDArray,
    ranks: int = 50,
    progress: bool = False,
) -> tuple[float, list[float]]:
    """mAP and the cumulative matching curve by the cosine, as `evaluate_ranking` defines them.

    Beside the features it holds their normalised copies, (Q + G) C numbers, and the distances, Q G numbers. At least
    one query must have a match.

    Args:
        query_features: (Q, C), floating; gallery_features (G, C).
        query_identities, query_cameras: (Q,) integer; gallery_identities, gallery_cameras (G,).
        ranks: length of the curve.
        progress: draw a progress bar.
    """
    query = query_features / np.linalg.norm(query_features, axis=1, keepdims=True)
    gallery = gallery_features / np.linalg.norm(gallery_features, axis=1, keepdims=True)
    distances = query @ gallery.T
    np.negative(distances, out=distances)
    average_precisions, first_places = [], []
    queries = zip(distances, query_identities, query_cameras, strict=True)
    for row, identity, camera in tqdm(queries, "ranking", len(query), unit=" query", disable=not progress, leave=False):
        order = np.argsort(row, kind="stable")
        same_identity = gallery_identities[order] == identity
        junk = same_identity & (gallery_cameras[order] == camera)
        places = np.flatnonzero(same_identity[~junk]) + 1
        if len(places):
            average_precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
            first_places.append(places[0])
    curve = [float(np.mean(np.array(first_places) <= rank)) for rank in range(1, ranks + 1)]
    return float(np.mean(average_precisions)), curve

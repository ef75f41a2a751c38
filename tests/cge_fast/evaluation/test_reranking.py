"""Re-ranking against the published algorithm written as loops over a dense float64 matrix."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_fast.evaluation import ranking, reranking
from cge_fast.evaluation.ranking import evaluate_ranking
from cge_fast.evaluation.reranking import evaluate_reranking, reranked_distances


def dense(query, gallery, metric, k1=20, k2=6, original_share=0.3):
    """Final distances (Q, G), image by image; the sets are Python sets."""
    features = np.concatenate([query, gallery]).astype(np.float64)
    if metric == "cosine":
        features /= np.linalg.norm(features, axis=1, keepdims=True)
    images = range(len(features))
    squares = np.array([[((features[i] - features[j]) ** 2).sum() for j in images] for i in images])
    if metric == "cosine":
        squares = squares.astype(np.float32)  # images of the same direction tie
    original = np.array([row / (row.max() or 1) for row in squares])
    order = [sorted(images, key=lambda j, i=i: (original[i][j], j)) for i in images]

    def reciprocal(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    encodings = np.zeros_like(original)
    for i in images:
        members = set(near := reciprocal(i, k1))
        for candidate in near:
            theirs = reciprocal(candidate, round(k1 / 2))
            if len(theirs & near) > 2 / 3 * len(theirs):
                members |= theirs
        for j in members:
            encodings[i, j] = math.exp(-original[i, j])
        if members:
            encodings[i] /= encodings[i].sum()
    encodings = np.array([np.mean([encodings[j] for j in order[i][:k2]], axis=0) for i in images])
    final = np.empty((len(query), len(gallery)))
    for q in range(len(query)):
        for g in range(len(gallery)):
            shared = np.minimum(encodings[q], encodings[len(query) + g]).sum()
            jaccard = 1 - shared / (2 - shared)
            final[q, g] = (1 - original_share) * jaccard + original_share * original[q, len(query) + g]
    return final


def clustered(seed, queries, gallery, channels=5, clusters=3):
    """Features around a few centres, so that the sets of neighbours differ in size."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, channels))
    features = centres[random.integers(clusters, size=queries + gallery)] + random.normal(
        size=(queries + gallery, channels), scale=0.4
    )
    return torch.from_numpy(features[:queries]).float(), torch.from_numpy(features[queries:]).float()


def all_distances(query, gallery, *arguments):
    return reranked_distances(query, gallery, *arguments)(slice(0, len(query)))


def assert_dense(query, gallery, *arguments):
    expected = torch.from_numpy(dense(query.numpy(), gallery.numpy(), *arguments)).float()
    # A float32 distance between unit features is off by units of 2^-24, and is divided by the image's largest.
    images = torch.cat([query, gallery]).double()
    images = torch.nn.functional.normalize(images) if arguments[0] == "cosine" else images / images.norm(dim=1).max()
    largest = torch.cdist(images, images).square().amax(dim=1).clamp(min=1e-3).min().item()
    tolerance = 1e-6 + 4 * 2**-24 / largest
    torch.testing.assert_close(all_distances(query, gallery, *arguments), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(
    ("queries", "gallery"), [(7, 13), (1, 30), (1, 1), (3, 8), (30, 61)], ids=lambda number: str(number)
)
def test_equals_the_published_algorithm(metric, queries, gallery):
    assert_dense(*clustered(queries, queries, gallery), metric)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 9),
    gallery=st.integers(1, 33),
    k1=st.integers(1, 8),
    k2=st.integers(1, 5),
    original_share=st.sampled_from([0.0, 0.3, 1.0]),
    metric=st.sampled_from(["cosine", "euclidean"]),
)
def test_equals_the_published_algorithm_for_other_neighbourhoods(
    seed, queries, gallery, k1, k2, original_share, metric
):
    assert_dense(*clustered(seed, queries, gallery), metric, k1, k2, original_share)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), gallery=st.integers(1, 33), k1=st.integers(1, 8))
def test_equal_distances_order_by_index(seed, gallery, k1):
    random = np.random.default_rng(seed)
    features = torch.from_numpy(random.integers(-1, 2, size=(4 + gallery, 2))).float()  # exact, and many are equal
    assert_dense(features[:4], features[4:], "euclidean", k1, 3)


@pytest.mark.parametrize("images", [5, 40])
def test_images_that_are_all_the_same_have_equal_original_distances_and_no_nan(images):
    query, gallery = torch.ones(2, 3), torch.ones(images, 3)
    assert not all_distances(query, gallery, "cosine").isnan().any()
    assert (all_distances(query, gallery, "cosine", 20, 6, 1.0) == 0).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_chunks_and_blocks_do_not_change_a_bit(metric, monkeypatch):
    query, gallery = clustered(0, 7, 40)
    whole = all_distances(query, gallery, metric)
    monkeypatch.setattr(ranking, "CHUNK_DISTANCES", 1)
    monkeypatch.setattr(reranking, "BLOCK_IMAGES", 3)
    monkeypatch.setattr(reranking, "BLOCK_ENTRIES", 1)
    distances_of = reranked_distances(query, gallery, metric)
    assert torch.equal(torch.cat([distances_of(slice(q, q + 1)) for q in range(7)]), whole)
    assert torch.equal(distances_of(slice(2, 5)), whole[2:5])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), gallery=st.integers(2, 60))
def test_permuting_the_gallery_permutes_the_distances(seed, gallery):
    query, images = clustered(seed, 5, gallery)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(gallery))
    expected = all_distances(query, images, "euclidean")[:, order]
    torch.testing.assert_close(all_distances(query, images[order], "euclidean"), expected, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), metric=st.sampled_from(["cosine", "euclidean"]))
def test_distances_lie_between_0_and_1_and_the_scale_of_the_features_does_not_matter(seed, metric):
    query, gallery = clustered(seed, 5, 30)
    result = all_distances(query, gallery, metric)
    assert (result >= 0).all()
    assert (result <= 1 + 1e-6).all()
    torch.testing.assert_close(all_distances(query * 8, gallery * 8, metric), result, rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_with_the_original_distance_alone_the_ranking_is_the_one_without_reranking(metric, monkeypatch):
    query, gallery = clustered(1, 6, 50)
    ids = torch.arange(6) % 3, torch.arange(50) % 3
    arguments = (query, ids[0], torch.zeros(6), gallery, ids[1], torch.ones(50), metric)
    plain = evaluate_ranking(*arguments)
    assert evaluate_reranking(*arguments) != plain
    monkeypatch.setattr(reranking, "reranked_distances", partial(reranked_distances, original_share=1.0))
    assert evaluate_reranking(*arguments) == plain


def test_shared_neighbours_pull_a_far_match_forward():
    """The far end of the query's identity, a chain, is farther from the query than strangers are."""
    chain = torch.stack([torch.linspace(0, 3, 13), torch.zeros(13)], dim=1)
    strangers = torch.stack([torch.zeros(13), torch.linspace(2, 6, 13)], dim=1)
    gallery, ids = torch.cat([chain[1:], strangers]), torch.tensor([1] * 12 + [2] * 13)
    arguments = (chain[:1], torch.tensor([1]), torch.tensor([0]), gallery, ids, torch.ones(25), "euclidean")
    assert evaluate_reranking(*arguments).mAP > evaluate_ranking(*arguments).mAP


def test_features_that_are_not_finite_are_refused():
    good, ids = torch.ones(1, 2), torch.tensor([1])
    with pytest.raises(ValueError, match="gallery_features must be finite"):
        evaluate_reranking(good, ids, ids, good * torch.nan, ids, ids + 1)


def test_an_empty_gallery_has_no_match():
    ids = torch.tensor([1])
    with pytest.raises(ValueError, match="no query has a match"):
        evaluate_reranking(torch.ones(1, 2), ids, ids, torch.ones(0, 2), ids[:0], ids[:0])


@pytest.mark.slow
def test_no_tensor_has_a_row_and_a_column_for_each_image(monkeypatch):
    """Every operation's result is watched: the largest must not grow with the square of the images."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    for module, name, value in (
        (ranking, "CHUNK_DISTANCES", 6000),
        (ranking, "BLOCK_IMAGES", 64),
        (reranking, "BLOCK_IMAGES", 64),
        (reranking, "BLOCK_ENTRIES", 64),
    ):
        monkeypatch.setattr(module, name, value)
    query, gallery = clustered(0, 300, 300, channels=8, clusters=100)
    ids = torch.zeros(300)
    with Largest() as largest:
        evaluate_reranking(query, ids, ids, gallery, ids, ids + 1)
    assert 0 < largest.entries < 300 * 300 / 2

"""The nearest images: exact, in chunks, with faiss or without."""

import sys

import numpy as np
import pytest
import torch

from cge_fast.evaluation import ranking
from cge_fast.evaluation.nearest import by_faiss, nearest


@pytest.fixture
def without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)


def few_values(queries, images):
    """Features of small whole numbers, so that many distances are equal, none of length 0."""
    random = np.random.default_rng(images)
    return [torch.from_numpy(random.integers(1, 4, size=(count, 2))).float() for count in (queries, images)]


def by_hand(query, gallery, metric, count):
    """Of float64, with all distances sorted."""
    if metric == "cosine":
        lengths = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)
        distance = np.round(-(query @ gallery.T) / lengths, 9)
    else:
        distance = ((query[:, None] - gallery) ** 2).sum(axis=2) / 2
    index = np.argsort(distance, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(distance, index, axis=1), index


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("queries", "images", "count"), [(3, 1, 1), (3, 7, 20), (1, 40, 5), (11, 41, 1), (0, 5, 2)])
@pytest.mark.parametrize("chunk", [1, 2**25])
def test_they_are_the_least_distances_in_order(monkeypatch, without_faiss, metric, queries, images, count, chunk):
    monkeypatch.setattr(ranking, "CHUNK_DISTANCES", chunk)
    monkeypatch.setattr(ranking, "BLOCK_IMAGES", 8)
    query, gallery = few_values(queries, images)
    distance, index = nearest(query, gallery, metric, count)
    expected, places = by_hand(query.double().numpy(), gallery.double().numpy(), metric, count)
    np.testing.assert_array_equal(index.numpy(), places.reshape(index.shape))
    np.testing.assert_allclose(distance.numpy(), expected.reshape(distance.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_faiss_finds_the_same(monkeypatch, metric):
    pytest.importorskip("faiss", reason="pip install 'cge-fast[search]'")
    random = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(count, 19, generator=random) for count in (7, 500))
    found = nearest(query, gallery, metric, 20)
    assert by_faiss(query, gallery, metric, 20).shape == (7, 20)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        assert by_faiss(query, gallery, metric, 20) is None
        exact = nearest(query, gallery, metric, 20)
    assert torch.equal(found[1], exact[1])
    assert torch.equal(found[0], exact[0])


def test_whatever_order_they_are_found_in_they_are_given_in_theirs(monkeypatch, without_faiss):
    query, gallery = few_values(3, 40)
    expected = nearest(query, gallery, "cosine", 9)
    monkeypatch.setattr("cge_fast.evaluation.nearest.by_faiss", lambda *_: expected[1].flip(1))
    found = nearest(query, gallery, "cosine", 9)
    assert all(map(torch.equal, found, expected))


def test_an_image_is_at_no_distance_from_itself(without_faiss):
    features = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) + 1000
    distance, index = nearest(features, features, "euclidean", 1)
    assert index[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert distance.abs().max() < 1e-5


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="gallery must be finite"):
        nearest(torch.ones(1, 2), torch.tensor([[1.0, torch.nan]]), "cosine", 1)

"""The evaluator against an obvious implementation, one query at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_fast.evaluation import ranking
from cge_fast.evaluation.ranking import evaluate_ranking


def obvious(distance, query_ids, query_cameras, gallery_ids, gallery_cameras):
    """AP, INP and rank of the first match of each query that has one."""
    found = []
    for q in range(len(query_ids)):
        ranked = sorted(range(len(gallery_ids)), key=lambda g, q=q: (distance[q][g], g))
        kept = [g for g in ranked if not (gallery_ids[g] == query_ids[q] and gallery_cameras[g] == query_cameras[q])]
        hits = [place for place, g in enumerate(kept, start=1) if gallery_ids[g] == query_ids[q]]
        if hits:
            precisions = [(number + 1) / place for number, place in enumerate(hits)]
            found.append((sum(precisions) / len(hits), len(hits) / hits[-1], hits[0]))
    return found


def integers(random, *shape):
    """Small whole numbers: distances are exact in float32 and many are equal."""
    return torch.from_numpy(random.integers(-2, 3, size=shape)).float()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 8),
    gallery=st.integers(1, 30),
    chunk=st.sampled_from([1, 40, 10**6]),
)
def test_equals_the_obvious_implementation_with_ties_junk_and_missing_matches(seed, queries, gallery, chunk):
    random = np.random.default_rng(seed)
    q, g = integers(random, queries, 2), integers(random, gallery, 2)
    ids = [torch.from_numpy(random.integers(0, 4, size=count)) for count in (queries, gallery)]
    cameras = [torch.from_numpy(random.integers(0, 3, size=count)) for count in (queries, gallery)]
    distance = ((q[:, None] - g[None]) ** 2).sum(dim=2).tolist()
    expected = obvious(distance, ids[0].tolist(), cameras[0].tolist(), ids[1].tolist(), cameras[1].tolist())
    before, ranking.CHUNK_DISTANCES = ranking.CHUNK_DISTANCES, chunk
    try:
        arguments = (q, ids[0], cameras[0], g, ids[1], cameras[1], "euclidean")
        if not expected:
            with pytest.raises(ValueError, match="no query has a match"):
                evaluate_ranking(*arguments)
            return
        result = evaluate_ranking(*arguments)
    finally:
        ranking.CHUNK_DISTANCES = before
    assert result.mAP == pytest.approx(np.mean([ap for ap, _, _ in expected]))
    assert result.mINP == pytest.approx(np.mean([inp for _, inp, _ in expected]))
    for k in (1, 2, 5, 50):
        assert result.rank(k) == pytest.approx(np.mean([first <= k for *_, first in expected]))
    assert (result.queries, result.skipped) == (len(expected), queries - len(expected))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("queries", [1, 5])
def test_real_features_far_from_the_origin_and_gallery_images_that_are_there_twice(metric, queries):
    random = torch.Generator().manual_seed(0)
    gallery = (20 + 0.02 * torch.randn(300, 256, generator=random)).repeat(2, 1)
    query = gallery[:queries] + 0.002 * torch.randn(queries, 256, generator=random)
    ids = torch.arange(queries), torch.arange(600) % 300
    cameras = torch.zeros(queries, dtype=torch.long), torch.ones(600, dtype=torch.long)
    cameras[1][:300] = 0  # the first copy is junk: the second stands right behind it
    a, b = query.double(), gallery.double()
    if metric == "cosine":
        a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").tolist()
    expected = obvious(distance, *(x.tolist() for x in (ids[0], cameras[0], ids[1], cameras[1])))
    result = evaluate_ranking(query, ids[0], cameras[0], gallery, ids[1], cameras[1], metric)
    assert result.mAP == pytest.approx(np.mean([ap for ap, _, _ in expected]))
    assert result.rank(1) == 1


def test_cosine_ranks_by_angle_whatever_the_length():
    gallery = torch.tensor([[100.0, 1.0], [0.1, 0.1]])
    ids, cameras = torch.tensor([7, 8]), torch.tensor([1, 1])
    query = torch.tensor([[1.0, 1.0]]), torch.tensor([8]), torch.tensor([0])
    assert evaluate_ranking(*query, gallery, ids, cameras, "cosine").mAP == 1
    assert evaluate_ranking(*query, gallery * 0.001, ids, cameras, "cosine").mAP == 1


def test_euclidean_ranks_by_distance():
    gallery = torch.tensor([[100.0, 100.0], [1.0, 0.9]])
    result = evaluate_ranking(
        torch.tensor([[1.0, 1.0]]), torch.tensor([8]), torch.tensor([0]),
        gallery, torch.tensor([8, 7]), torch.tensor([1, 1]), "euclidean",
    )  # fmt: skip
    assert result.mAP == 0.5


def test_distractors_take_places_but_are_nobodys_match():
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    result = evaluate_ranking(
        torch.tensor([[1.0, 0.0]]), torch.tensor([5]), torch.tensor([1]),
        gallery, torch.tensor([0, 5]), torch.tensor([2, 2]),
    )  # fmt: skip
    assert result.mAP == 0.5
    assert result.rank(1) == 0
    assert result.rank(2) == 1


def test_features_that_are_not_finite_are_refused():
    good, ids = torch.ones(1, 2), torch.tensor([1])
    with pytest.raises(ValueError, match="gallery_features must be finite"):
        evaluate_ranking(good, ids, ids, good * torch.nan, ids, ids + 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    gallery=st.integers(1, 60),
    distinct=st.integers(1, 3),
    identities=st.integers(1, 3),
    block=st.sampled_from([1, 7, 1024]),
)
def test_blocks_of_a_gallery_of_few_distinct_images_rank_as_the_obvious_implementation(
    seed, gallery, distinct, identities, block
):
    random = np.random.default_rng(seed)
    g = integers(random, distinct, 2)[torch.from_numpy(random.integers(distinct, size=gallery))]
    q = integers(random, 4, 2)
    ids = [torch.from_numpy(random.integers(0, identities, size=count)) for count in (4, gallery)]
    cameras = [torch.from_numpy(random.integers(0, 2, size=count)) for count in (4, gallery)]
    distance = ((q[:, None] - g[None]) ** 2).sum(dim=2).tolist()
    expected = obvious(distance, ids[0].tolist(), cameras[0].tolist(), ids[1].tolist(), cameras[1].tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK_IMAGES", block)
        arguments = (q, ids[0], cameras[0], g, ids[1], cameras[1], "euclidean")
        if not expected:
            with pytest.raises(ValueError, match="no query has a match"):
                evaluate_ranking(*arguments)
            return
        result = evaluate_ranking(*arguments)
    assert result.mAP == pytest.approx(np.mean([ap for ap, _, _ in expected]))
    assert result.mINP == pytest.approx(np.mean([inp for _, inp, _ in expected]))
    assert result.cmc == pytest.approx([np.mean([first <= k for *_, first in expected]) for k in range(1, 51)])


def test_keys_order_by_distance_then_by_index():
    ascending = [
        -torch.inf,
        -3e38,
        -2.5,
        -1.0,
        -1e-45,
        0.0,
        -0.0,
        0.0,
        1e-45,
        1.0,
        1.0,
        2.5,
        3e38,
        torch.inf,
        torch.nan,
    ]
    keys = ranking.order_keys(torch.tensor(ascending), torch.arange(len(ascending))).tolist()
    assert keys == sorted(set(keys))
    assert keys[-1] < ranking.BEHIND_ALL
    negative = ranking.order_keys(torch.tensor([-1.0, 1.0, -1.0]), torch.tensor([9, 0, 2])).tolist()
    assert negative[2] < negative[0] < negative[1]


def test_an_empty_gallery_has_no_match():
    ids = torch.tensor([1])
    with pytest.raises(ValueError, match="no query has a match"):
        evaluate_ranking(torch.ones(1, 2), ids, ids, torch.ones(0, 2), ids[:0], ids[:0])

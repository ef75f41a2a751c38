"""Ranked lists of the worst queries."""

import dataclasses
import shutil
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from cge_fast.analyze.ranked import Features, first_places, groups, plain_distances, ranked
from cge_fast.data import read
from cge_fast.errors import UserError
from cge_fast.evaluation.features import evaluate


def few_values(random, images, identities=5, cameras=3):
    """Features of small whole numbers, so that many distances are equal."""
    return Features(
        torch.from_numpy(random.integers(-2, 3, size=(images, 2))).float(),
        torch.from_numpy(random.integers(0, identities, size=images)),
        torch.from_numpy(random.integers(0, cameras, size=images)),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("images", [5, 40])
def test_the_first_images_are_by_distance_then_by_index_without_junk(seed, images):
    random = np.random.default_rng(seed)
    query, gallery = few_values(random, 6), few_values(random, images)
    distance = (query.features[:, None] - gallery.features).square().sum(dim=2).tolist()
    junk = (query.identities[:, None] == gallery.identities) & (query.cameras[:, None] == gallery.cameras)
    expected = [
        [g for g in sorted(range(images), key=lambda g, q=q: (distance[q][g], g)) if not junk[q, g]] for q in range(6)
    ]
    distances_of = plain_distances(query, gallery, "euclidean")
    assert junk.any()
    for index, images in enumerate(expected):
        matches = [g for g in images if query.identities[index] == gallery.identities[g]]
        if matches:
            first_match, places = first_places(query, gallery, distances_of, index)
            assert images[first_match - 1] == matches[0]
            shown = images[:10] + images[first_match - 1 : first_match] * (first_match > 10)
            assert places == {images.index(image) + 1: image for image in shown}


@pytest.mark.parametrize("rerank", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_rows_are_queries_of_the_evaluation(opened, rows_of, tmp_path, market, rerank):
    other = shutil.copytree(market, tmp_path / "market")
    PIL.Image.new("RGB", (16, 24)).save(other / "query" / "0099_c1s1_000000_00.png")  # has no match
    trained = opened(
        *("mine", "--evaluation.flip_test", "true", "--evaluation.metric", "euclidean"),
        *("--evaluation.rerank", rerank, "--data.root", str(other)),
    )
    config = trained.config
    evaluated = evaluate(trained.model, read(config.data), config.data, config.evaluation)
    rows = rows_of(ranked(trained, tmp_path, queries=100).table)
    by_query = {row["query"]: float(row["average_precision"]) for row in rows}
    assert len(by_query) == evaluated.queries == 4
    assert sum(by_query.values()) / 4 == pytest.approx(evaluated.mAP, rel=1e-12)
    assert list(by_query.values()) == sorted(by_query.values())
    assert {row["group"] for row in rows} == {"worst"}
    for row in rows:
        assert (row["correct"] == "True") == (row["identity"] == row["query_identity"])
        assert (row["identity"], row["camera"]) != (row["query_identity"], row["query_camera"])
    for query in by_query:
        ranks = [int(row["rank"]) for row in rows if row["query"] == query]
        (first_match,) = {int(row["first_match"]) for row in rows if row["query"] == query}
        assert ranks == sorted({*range(1, 11), first_match})
        assert (
            next(int(row["rank"]) for row in rows if row["query"] == query and row["correct"] == "True") == first_match
        )

    few = ranked(trained, tmp_path, queries=1)
    group_of = {row["query"]: row["group"] for row in rows_of(few.table)}
    assert [*group_of.values()] == ["worst", "random", "best"]
    worst, *middle, best = by_query
    assert [*group_of][::2] == [worst, best]
    assert [*group_of][1] in middle
    assert few.picture.exists()
    assert f"mAP {evaluated.mAP:.1%} of 4 queries; worst AP {by_query[worst]:.1%}, random AP" in few.summary


@pytest.mark.parametrize("queries", [1, 2, 3, 5])
def test_no_query_is_in_two_groups_and_each_ascends(queries):
    precisions = torch.tensor([0.5, torch.nan, 0.1, 0.9, 0.1, 0.7, torch.nan, 0.3], dtype=torch.float64)
    retrieval = SimpleNamespace(average_precisions=precisions, queries=6)
    shown = groups(retrieval, queries)
    flat = [index for group in shown for index in group]
    assert len(flat) == len(set(flat)) == min(6, 3 * queries)
    assert precisions[flat].tolist() == sorted(precisions[flat].tolist())
    assert shown[0] == [2, 4, 7, 0, 5][:queries]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_precisions_and_lists_are_of_the_metric_that_is_set(opened, rows_of, tmp_path, monkeypatch, metric):
    trained = opened("mine", "--evaluation.metric", metric, change=few_and_long_features)
    config = trained.config
    evaluated = {
        name: evaluate(
            trained.model, read(config.data), config.data, dataclasses.replace(config.evaluation, metric=name)
        ).mAP
        for name in ("cosine", "euclidean")
    }
    assert evaluated["cosine"] != pytest.approx(evaluated["euclidean"], rel=1e-2), "or this could not fail"
    monkeypatch.setattr("cge_fast.analyze.ranked.SHOWN", 20)  # the whole gallery
    lists = defaultdict(list)
    for row in rows_of(ranked(trained, tmp_path, queries=100).table):
        lists[row["query"], float(row["average_precision"])].append(row["correct"] == "True")
    for (_, precision), right in lists.items():
        ranks = [rank for rank, is_right in enumerate(right, start=1) if is_right]
        assert precision == pytest.approx(np.mean([number / rank for number, rank in enumerate(ranks, start=1)]))
    assert np.mean([precision for _, precision in lists]) == pytest.approx(evaluated[metric])


def few_and_long_features(run) -> None:
    """Two channels alone count, so that lengths and angles differ."""
    run.model.neck.weight.zero_()
    run.model.neck.weight[:2] = 1


def test_features_that_are_not_finite_are_refused(opened, tmp_path):
    trained = opened("broken", change=lambda run: run.model.neck.weight.fill_(3e38))
    with pytest.raises(UserError, match=r"^checkpoint .*: the feature of a query image is not finite$"):
        ranked(trained, tmp_path)

"""The NumPy evaluator agrees with ours, and the benchmark runs at a tiny size."""

import numpy as np
import pytest
import torch

from bench import evaluate
from bench.evaluate import numpy_ranking
from cge_fast.evaluation.ranking import evaluate_ranking


def assert_agree(*drawn: torch.Tensor) -> None:
    result = evaluate_ranking(*drawn)
    mean_average_precision, curve = numpy_ranking(*(tensor.numpy() for tensor in drawn))
    assert mean_average_precision == pytest.approx(result.mAP, abs=1e-12)
    assert curve == pytest.approx(list(result.cmc), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_it_agrees_with_ours_on_ties_junk_and_queries_without_a_match(seed):
    random = torch.Generator().manual_seed(seed)
    drawn = []
    for count, identities in ((30, 9), (70, 6)):  # three identities are not in the gallery
        signs = torch.randint(2, (count, 4), generator=random) * 2.0 - 1  # of norm 2: cosines are exact, many are equal
        drawn += [signs, torch.randint(identities, (count,), generator=random)]
        drawn += [torch.randint(3, (count,), generator=random)]
    assert evaluate_ranking(*drawn).skipped > 0
    assert_agree(*drawn)


def test_it_agrees_with_ours_on_random_features():
    assert_agree(*evaluate.draw(evaluate.Size(queries=20, gallery=200, identities=10, cameras=3, channels=16)))


def test_equal_distances_rank_by_gallery_index_and_junk_takes_no_place():
    features, identities = np.ones((1, 2)), np.array([5])
    gallery = np.ones((4, 2)), np.array([5, 7, 5, 5]), np.array([0, 0, 1, 1])  # the first is junk
    mean_average_precision, curve = numpy_ranking(features, identities, np.array([0]), *gallery, ranks=2)
    assert mean_average_precision == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert curve == [0, 1]


@pytest.mark.slow
def test_both_evaluators_are_measured_apart_with_the_same_map(monkeypatch):
    size = evaluate.Size(queries=5, gallery=1_040, identities=3, cameras=2, channels=4)
    monkeypatch.setattr(evaluate, "SIZES", {"tiny": size})
    figures = {(figure.contender, figure.quantity): figure for figure in evaluate.measure(["tiny"], repeats=1)}
    assert {figure.subject for figure in figures.values()} == {"tiny: 5 x 1,040"}
    for evaluator in ("cge_fast", "NumPy"):
        assert figures[evaluator, "mAP"].value == pytest.approx(100 * evaluate_ranking(*evaluate.draw(size)).mAP)
        assert figures[evaluator, "time"].value > 0
        assert figures[evaluator, "above the features"].value >= 0

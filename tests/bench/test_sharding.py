"""What a rank needs, by formula and as it was measured."""

import pytest

from bench import sharding
from bench.sharding import need


def test_the_formulas_by_hand(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "1")
    found = need(classes=10, ranks=3, batch=2, channels=5, stripes=2)
    assert found.state == 4 * 5 * 4 * 6  # 4 rows of 5 numbers: classifier, gradient, two moments, two stripes
    assert found.features == 2 * 4 * 6 * 5 * 3
    assert found.scratch == 2 * 4 * 3 * 4 * 6
    # features and gradients of the other ranks' 4 samples, the write's local features, and the statistics twice
    assert found.received == 4 * (2 * 4 * 5 * 3 + 4 * 5 * 2 + 2 * (12 * 3 + 12))
    assert found.flops == 2 * 6 * 4 * 5 * 11


def test_scratch_stays_within_its_budget_and_the_rest_falls_with_the_ranks():
    one, many = need(10**8, 8, 64, 2048, 3), need(10**8, 64, 64, 2048, 3)
    assert one.scratch == many.scratch == 256 << 20
    assert one.state == 8 * many.state
    assert one.flops == many.flops  # the batch grows as the rows shrink


@pytest.mark.slow
def test_what_is_measured_agrees_with_the_formulas():
    figures = list(sharding.measure(batch=4, channels=64, stripes=3, ranks=[2], classes=5003))
    found = {(figure.quantity, figure.contender): figure.value for figure in figures}
    assert 0.8 * found["held", "formula"] < found["held", "measured"] < 1.1 * found["held", "formula"]
    assert found["received", "measured"] == pytest.approx(found["received", "formula"], abs=0.1e6)


def test_every_size_is_computed():
    figures = list(sharding.measure(64, 2048, 3, ranks=[], classes=1))
    assert len({(f.subject, f.contender) for f in figures}) == len(sharding.CLASSES) * len(sharding.RANKS)
    one = {f.quantity: f.value for f in figures if (f.subject, f.contender) == ("N 1e+06", "8 GPUs")}
    assert one["held"] == one["state"] + one["features"] + one["scratch"]

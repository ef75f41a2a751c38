"""Memory and time of the loss over the number of identities."""

import pytest

from bench import loss
from bench.cases import EAGER, OURS
from bench.measure import Ceilings
from bench.shapes import Shape


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No compiler, no process of its own, and a rate that needs no large matmul."""
    monkeypatch.setattr(loss, "missing_compiler", lambda: "no C++ compiler")
    monkeypatch.setattr(loss, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(loss, "measure_ceilings", lambda *_: Ceilings(bandwidth=1.0, flops=2.0))


def test_ours_needs_less_memory(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "1")
    figures = list(loss.measure(classes=[4000], batch=64, channels=8, contenders=[OURS, EAGER], rounds=1))
    extra = {figure.contender: figure.value for figure in figures if figure.quantity == "extra memory"}
    # eager holds the scores of 3 stripes and the logits, 4 MiB, at least; ours half a mebibyte of each kind of scratch
    assert extra[OURS] <= 1.5 * 2**20 < 3.9 * 2**20 <= extra[EAGER]
    assert {figure.subject for figure in figures} == {"N 4,000"}


@pytest.mark.parametrize("contender", [OURS, EAGER])
def test_figures_by_hand(contender, monkeypatch):
    monkeypatch.setattr(loss, "apart", lambda function, *arguments: (3 << 20, [0.5, 0.5, 0.5], 2e6))
    step, extra, share = loss.measure(classes=[1000], batch=4, channels=8, contenders=[contender], rounds=3)
    assert (step.value, step.contender, extra.value) == (0.5, contender, 3 << 20)
    # 9 products of 2 * 4 * 1000 * 8 FLOPs
    assert share.value == pytest.approx(100 * 9 * 2 * 4 * 1000 * 8 / 0.5 / 2e6)


@pytest.mark.parametrize("contender", [OURS, EAGER])
def test_one_contender_at_one_size(contender):
    shape = Shape(batch=4, channels=4, height=3, width=1, classes=50)
    extra, seconds, matmul = loss.measure_here(contender, shape, rounds=2)
    assert extra > 0
    assert len(seconds) == 2
    assert matmul == 2.0

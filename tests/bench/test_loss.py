"""Memory and time of the loss over the number of identities."""

from unittest.mock import patch

import pytest

from bench import loss, operators
from bench.cases import EAGER, OURS
from bench.results import Figure


def measure(**sizes: int) -> dict[tuple[str, str], Figure]:
    """Figures by contender and quantity, without compiler and with rates that need no large matmul."""
    with patch.object(operators, "missing_compiler", lambda: "none"), patch.object(loss, "measure_ceilings") as rates:
        rates.return_value = (1e9, 2.0)
        figures = list(loss.measure(**sizes, contenders=[OURS, EAGER], rounds=1))
    assert {figure.subject for figure in figures} == {f"N {n:,}" for n in sizes["classes"]}
    return {(figure.contender, figure.quantity): figure for figure in figures}


@pytest.mark.usefixtures("without_gpu")  # whose allocator rounds, and whose libraries take memory
def test_ours_needs_less_memory(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "1")
    found = measure(classes=[4000], batch=64, channels=8)
    # eager holds the scores of 3 stripes and the logits, 4 MiB, at least; ours half a mebibyte of each kind of scratch
    assert found[OURS, "extra memory"].value <= 1.5 * 2**20 < 3.9 * 2**20 <= found[EAGER, "extra memory"].value


def test_figures_by_hand(monkeypatch):
    monkeypatch.setattr(operators, "take_turns", lambda runs, *_: {name: {"step": [0.5, 0.6, 0.7]} for name in runs})
    found = measure(classes=[1000], batch=4, channels=8)
    assert {name: found[name, "step"].value for name in (OURS, EAGER)} == {OURS: 0.6, EAGER: 0.6}
    # 9 products of 2 * 4 * 1000 * 8 FLOPs, at 2 a second
    assert found["floor", "step"].value == 9 * 2 * 4 * 1000 * 8 / 2
    assert {figure.bench for figure in found.values()} >= {"loss, step", "loss, extra memory"}

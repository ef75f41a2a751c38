"""What a rank needs, by formula and as it was measured."""

import pytest

from bench import sharding
from bench.sharding import need
from cge_fast.errors import UserError


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


def test_what_is_measured_agrees_with_the_formulas(capsys):
    sharding.main(["--measure", "2", "--batch", "4", "--channels", "64", "--classes", "5003", "--markdown"])
    *_, line = capsys.readouterr().out.splitlines()
    _, _, wanted, held, wanted_received, received = (
        float(cell.replace(",", "")) for cell in line.strip("|").split("|")
    )
    assert 0.8 * wanted < held < 1.1 * wanted
    assert received == pytest.approx(wanted_received, abs=0.1)


def test_the_program_prints_every_size(capsys):
    sharding.main(["--markdown"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(sharding.CLASSES) * len(sharding.RANKS)


def test_too_few_classes_are_named():
    with pytest.raises(UserError, match="classes: must be at least ranks times batch, got 10"):
        sharding.main(["--measure", "2", "--classes", "10"])

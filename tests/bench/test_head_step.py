"""The head's step beside its floor."""

import pytest
import torch

from bench import ceilings, head_step
from bench.shapes import SHAPES
from bench.work import work


def test_the_floor_is_bytes_flops_and_powers_at_the_measured_rates(monkeypatch):
    monkeypatch.setattr(head_step, "measure_ceilings", lambda *_: ceilings.Ceilings(bandwidth=1e9, flops=1e9))
    monkeypatch.setattr(head_step, "power_rate", lambda *_: 1e9)
    needed = work("head", SHAPES["tiny"], "gem")
    both = needed["forward"] + needed["backward"]
    total = both.bytes + both.flops + 2 * 4 * 8 * 6 * 2
    _, floor = head_step.floor_lines(SHAPES["tiny"], "gem", rounds=1)
    assert floor.startswith(f"floor {total / 1e6:.1f} ms: ")


def test_it_prints_both_poolings_and_their_parts(monkeypatch, capsys):
    monkeypatch.setattr("bench.cases.missing_compiler", lambda: "no C++ compiler")
    monkeypatch.setattr(head_step, "missing_compiler", lambda: "no C++ compiler")
    monkeypatch.setattr(head_step, "measure_ceilings", lambda *_: ceilings.Ceilings(1e9, 1e9))
    head_step.main(["--shape", "tiny", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "no C++ compiler" in printed
    for pooling in ("gem", "average"):
        assert f"{pooling}: {SHAPES['tiny']}" in printed
    assert printed.count("stripe_pool, backward") == 2
    assert printed.count("1.00x") == 2


def test_powers_are_counted_by_the_second():
    assert head_step.power_rate(torch.device("cpu"), rounds=1) > 0
    with pytest.raises(SystemExit):
        head_step.main(["--rounds", "many"])

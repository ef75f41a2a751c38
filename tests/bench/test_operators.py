"""Every operator is measured in every direction, at a tiny shape; no time is asserted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import operators
from bench.cases import CASES, COMPILED, EAGER, OURS, Case, contenders
from bench.measure import CPU
from bench.shapes import SHAPES, Shape
from cge_fast.compiled import missing_compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_runs_with_equal_results(case):
    compared = contenders(case, SHAPES["tiny"], torch.float32, CPU, with_compiled=False)
    assert list(compared) == [OURS, EAGER]
    for contender in compared.values():
        assert ("backward" in contender()) == (case.operator != "write_memory_")
    if case.operator in ("stripe_pool", "revise_logits", "revise_logits_one_pass"):
        torch.testing.assert_close(compared[OURS].forward(), compared[EAGER].forward())


@pytest.mark.skipif(bool(missing_compiler()), reason="no compiler")
@pytest.mark.slow
def test_the_compiled_reference_is_the_reference():
    compared = contenders(Case("revise_logits"), SHAPES["tiny"], torch.float32, CPU)
    torch.testing.assert_close(compared[COMPILED].forward(), compared[EAGER].forward())
    assert set(compared[COMPILED]()) == {"forward", "backward", "step"}


def test_an_unknown_operator_is_named():
    with pytest.raises(ValueError, match="operator must be one of cge_kernels' or 'head', got 'convolve'"):
        contenders(Case("convolve"), SHAPES["tiny"], torch.float32, CPU, with_compiled=False)


@pytest.fixture
def quick(monkeypatch):
    """No compiler, and rates that need no large matmul."""
    monkeypatch.setattr(operators, "missing_compiler", lambda: "no C++ compiler")
    monkeypatch.setattr(operators, "measure_ceilings", lambda *_: (100.0, 10.0))


@pytest.mark.usefixtures("quick")
def test_each_direction_of_each_contender_is_a_figure_beside_its_floor(capsys):
    rates, figures = [], []
    for figure in operators.measure(["tiny"], ["stripe_pool", "write_memory_"], "float32", rounds=2, seconds=1.0):
        (rates if figure.bench == "rates" else figures).append(figure)
    assert "no C++ compiler" in capsys.readouterr().err
    assert [(figure.contender, figure.value) for figure in rates] == [("copy", 100.0), ("matmul", 10.0)]
    places = [(figure.subject, figure.contender, figure.quantity) for figure in figures]
    assert all(figure.bench == f"operators, {figure.quantity}" for figure in figures)
    directions = ("forward", "backward", "step")
    assert places == [
        (subject, contender, quantity)
        for subject, timed in (
            ("stripe_pool, average", directions),
            ("stripe_pool, gem", directions),
            ("write_memory_", ("forward", "step")),
        )
        for contender in (OURS, EAGER, "floor")
        for quantity in (timed if contender == "floor" else (*timed, "extra memory"))
    ]
    times = [figure for figure in figures if figure.unit == "s" and figure.contender != "floor"]
    assert all(0 < figure.low <= figure.value <= figure.high for figure in times)


def test_floors_by_hand():
    shape = Shape(batch=4, channels=3, height=5, width=2, stripes=2, classes=7)
    case = Case("stripe_pool", "average")
    found = operators.floors(case, shape, torch.float32, 100.0, 10.0)
    # 120 numbers in the map, 12 global and 24 local features; a FLOP for each number of the map
    moved = 4 * (120 + 12 + 24)
    assert found == {"forward": 120 / 10, "backward": 120 / 10, "step": 240 / 10}
    found = operators.floors(case, shape, torch.float32, 10.0, 100.0)
    assert found == {"forward": moved / 10, "backward": moved / 10, "step": 2 * moved / 10}


@pytest.mark.slow
def test_pytest_benchmark_times_steps(tmp_path):
    chosen = "bench/", "-k", "write_memory_ and not compile", "--benchmark-max-time=0.1"
    command = [sys.executable, "-m", "pytest", *chosen]
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # else it times nothing
    environment["CGE_BENCH_SHAPE"] = "tiny"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert "tiny: write_memory_" in done.stdout
    assert "2 passed" in done.stdout

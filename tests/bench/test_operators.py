"""Every operator is measured in every direction, at a tiny shape; no time is asserted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import operators, pictures
from bench.cases import CASES, COMPILED, EAGER, OURS, Case, contenders
from bench.measure import Ceilings, missing_compiler, run
from bench.results import Figure
from bench.shapes import SHAPES, Shape

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PNG = b"\x89PNG"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_runs_with_equal_results(case):
    compared = contenders(case, SHAPES["tiny"], torch.float32, CPU, with_compiled=False)
    assert list(compared) == [OURS, EAGER]
    for contender in compared.values():
        assert ("backward" in run(contender, CPU)) == (case.operator != "write_memory_")
    if case.operator in ("stripe_pool", "revise_logits", "revise_logits_one_pass"):
        torch.testing.assert_close(compared[OURS].forward(), compared[EAGER].forward())


@pytest.mark.skipif(bool(missing_compiler()), reason="no compiler")
@pytest.mark.slow
def test_the_compiled_reference_is_the_reference():
    compared = contenders(Case("revise_logits"), SHAPES["tiny"], torch.float32, CPU)
    torch.testing.assert_close(compared[COMPILED].forward(), compared[EAGER].forward())
    assert set(run(compared[COMPILED], CPU)) == {"forward", "backward", "step"}


def test_an_unknown_operator_is_named():
    with pytest.raises(ValueError, match="operator must be one of cge_kernels' or 'head', got 'convolve'"):
        contenders(Case("convolve"), SHAPES["tiny"], torch.float32, CPU, with_compiled=False)


@pytest.fixture
def quick(monkeypatch):
    """No compiler, rates that need no large matmul, and small sweeps."""
    tiny = SHAPES["tiny"]
    monkeypatch.setattr(operators, "missing_compiler", lambda: "no C++ compiler")
    monkeypatch.setattr(operators, "measure_ceilings", lambda *_: Ceilings(bandwidth=100.0, flops=10.0))
    monkeypatch.setattr(operators, "SWEEPS", {"N": ("classes", tiny, (5, 10)), "B": ("batch", tiny, (4, 8))})


def measure(*names: str, pictures: Path | None = None) -> list[Figure]:
    return list(operators.measure(["tiny"], list(names), "float32", rounds=2, seconds=1.0, pictures=pictures))


@pytest.mark.usefixtures("quick")
def test_each_direction_of_each_contender_is_a_figure_beside_its_floor(capsys):
    rates, figures = [], []
    for figure in measure("stripe_pool", "write_memory_"):
        (rates if figure.bench == "rates" else figures).append(figure)
    assert "no C++ compiler" in capsys.readouterr().err
    assert [(figure.subject, figure.value) for figure in rates] == [("copy", 100.0), ("matmul", 10.0)]
    places = [(figure.subject, figure.contender, figure.quantity) for figure in figures]
    directions = ("forward", "backward", "step")
    assert places == [
        (subject, contender, quantity)
        for subject, timed in (
            ("stripe_pool, average", directions),
            ("stripe_pool, gem", directions),
            ("write_memory_", directions[:1]),
        )
        for contender, quantities in ((OURS, (*timed, "peak")), (EAGER, (*timed, "peak")), ("floor", timed))
        for quantity in quantities
    ]
    times = [figure for figure in figures if figure.unit == "s" and figure.contender != "floor"]
    assert all(0 < figure.low <= figure.value <= figure.high for figure in times)


def test_floors_by_hand():
    shape = Shape(batch=4, channels=3, height=5, width=2, stripes=2, classes=7)
    place = "operators", "tiny, float32", "stripe_pool, average"
    found = operators.floors(place, Case("stripe_pool", "average"), shape, torch.float32, Ceilings(100.0, 10.0))
    # 120 numbers in the map, 12 global and 24 local features; a FLOP for each number of the map
    moved = 4 * (120 + 12 + 24)
    assert [figure.value for figure in found] == [120 / 10, 120 / 10, 240 / 10]
    found = operators.floors(place, Case("stripe_pool", "average"), shape, torch.float32, Ceilings(10.0, 100.0))
    assert [figure.value for figure in found] == [moved / 10, moved / 10, 2 * moved / 10]


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_pictures_are_drawn_of_what_was_measured(tmp_path):
    figures = measure("stripe_pool", pictures=tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"roofline.png", "scaling.png"}
    assert all(file.read_bytes().startswith(PNG) for file in (tmp_path / "new").iterdir())
    swept = [(f.setting, f.subject, f.quantity) for f in figures if (f.bench, f.contender) == ("scaling", EAGER)]
    sizes = [("N", "5"), ("N", "10"), ("B", "4"), ("B", "8")]
    assert swept == [(*size, quantity) for size in sizes for quantity in ("step", "peak")]


def test_slope_is_the_power():
    assert pictures.fitted_slope([1, 10, 100], [3.0, 300.0, 30_000.0]) == pytest.approx(2.0)


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

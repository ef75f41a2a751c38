"""The report writes tables and pictures of whatever was measured, of everything at a tiny size."""

import csv
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentError

from bench import cases, report, scaling, train_step
from bench.measure import Times
from bench.shapes import SHAPES, Shape
from cge_fast.errors import UserError

PNG = b"\x89PNG"


@pytest.fixture
def small(monkeypatch):
    """A few operators, small sweeps, a training step without training, no compiler."""
    tiny = SHAPES["tiny"]
    monkeypatch.setattr(report, "CASES", [cases.Case("stripe_pool", "gem"), cases.Case("write_memory_")])
    monkeypatch.setattr(scaling, "SWEEPS", {"N": ("classes", tiny, (5, 10)), "B": ("batch", tiny, (4,))})
    monkeypatch.setattr("bench.cases.missing_compiler", lambda: "no C++ compiler")
    monkeypatch.setattr("bench.report.missing_compiler", lambda: "no C++ compiler")
    parts = {part: [1.0, 2.0, 3.0] for part in (*train_step.HEAD, train_step.WAITING, "backbone forward")}
    rows = [train_step.Row("resnet18", kernels, 8, parts) for kernels in train_step.KERNELS]
    monkeypatch.setattr(train_step, "measure", lambda name, setting, steps: rows)


def run(output, *arguments: str) -> None:
    report.main(["--shapes", "tiny", "--output", str(output), "--rounds", "2", *arguments])


@pytest.mark.usefixtures("small")
def test_all_files_are_written_and_say_where_and_when(tmp_path, capsys):
    run(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "table.md", "table.csv", *report.PICTURES}
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in report.PICTURES)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    places = [(row["operator"], row["direction"], row["contender"]) for row in rows]
    both = (cases.OURS, cases.EAGER)
    pooling = [("stripe_pool", direction, name) for direction in ("forward", "backward", "step") for name in both]
    assert places == pooling + [("write_memory_", "forward", name) for name in both]
    assert {float(row["times_ours"]) for row in rows if row["contender"] == cases.OURS} == {1.0}
    assert all(float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"]) for row in rows)
    text, page = (tmp_path / "table.md").read_text(), (tmp_path / "report.html").read_text()
    for written in (text, page):
        for said in (f"torch {torch.__version__}", "commit ", "no C++ compiler", "Ceilings", "slope"):
            assert said in written
    assert page.count("<img") == len(report.PICTURES)
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "table.md", "table.csv", "roofline.png"}
    assert "Interrupted" in (tmp_path / "report.html").read_text()


def test_rates_and_floor_by_hand():
    times = Times(torch.full((5,), 0.5))
    found = {cases.OURS: {"forward": times}, cases.EAGER: {"forward": Times(torch.full((5,), 2.0))}}
    shape = Shape(batch=4, channels=3, height=5, width=2, stripes=2, classes=7)
    ours, eager = report.rows_of("tiny", shape, cases.Case("stripe_pool", "average"), found, itemsize=4)
    assert ours.bytes_per_second == 2 * 4 * (120 + 12 + 24)
    assert ours.flops_per_second == 2 * 120
    assert eager.times.median / eager.ours == 4.0


def test_measured_times_stand_beside_predicted_ones(monkeypatch):
    asked = []

    def predicted(*arguments):
        asked.append(arguments)
        return [SimpleNamespace(operator="pool forward", predicted_us=250_000.0)]

    monkeypatch.setattr(report.predict, "predict", predicted)
    times = {"forward": Times(torch.full((5,), 0.5))}
    found = {cases.OURS: times, cases.EAGER: times}
    rows = report.rows_of("tiny", SHAPES["tiny"], cases.Case("stripe_pool", "gem"), found, itemsize=2)
    compared = report.compare_with_prediction(rows, "h100", "bfloat16")
    assert compared == [("tiny", "stripe_pool, gem, forward", "250000.0", "500000.0", "2.00")]
    assert asked == [("h100", "tiny", "bfloat16", "gem")]


def test_slope_is_the_power():
    assert scaling.fitted_slope([1, 10, 100], [3.0, 300.0, 30_000.0]) == pytest.approx(2.0)


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(UserError, match=r"shapes: must be of market1501, .*, got 'huge'"):
        report.main(["--shapes", "huge"])
    with pytest.raises(ArgumentError, match="h100"):
        report.main(["--against-prediction", "h2000"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"against-prediction: .* there is none here"):
            report.main(["--against-prediction", "h100", "--output", str(tmp_path / "none")])
        assert not (tmp_path / "none").exists()

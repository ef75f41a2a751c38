"""Each figure is a row of the results file, and of each subject the last run counts."""

import csv
from dataclasses import replace

import pytest
import torch

from bench.results import COLUMNS, Figure, append, read
from cge_fast.errors import UserError

FIGURE = Figure("loss", "B 4", "N 5", "eager", "step", "s", 2.0, 1.5, 2.5)
PEAK = Figure("loss", "B 4", "N 5", "eager", "peak", "B", 7)


@pytest.mark.parametrize(("samples", "mark"), [([1.0, 1.0, 1.0, 1.1, 1.1], ""), ([1.0, 1.0, 1.0, 2.0, 2.0], "~")])
def test_median_and_spread(samples, mark):
    figure = Figure.median("loss", "B 4", "N 5", "eager", "step", "s", samples=samples)
    assert (figure.value, figure.low) == (1.0, 1.0)
    assert figure.high - figure.value == pytest.approx(samples[-1] - 1.0)
    assert figure.mark == mark


def test_a_figure_without_percentiles_has_no_mark():
    assert PEAK.mark == ""


def test_rows_say_where_and_when_and_runs_collect_in_one_file(tmp_path):
    file = tmp_path / "results.csv"
    found = [*append([FIGURE], file), *append([replace(PEAK, subject="N 6")], file)]
    assert list(map(strip, found)) == [FIGURE, replace(PEAK, subject="N 6")]
    rows = list(csv.DictReader(file.open()))
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert f"torch {torch.__version__}" in rows[0]["versions"]
    assert all(rows[0][column] for column in ("machine", "commit", "time"))
    assert read(file) == found


def test_figures_that_came_before_an_error_are_in_the_file(tmp_path):
    def figures():
        yield FIGURE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(append(figures(), tmp_path / "results.csv"))
    assert list(map(strip, read(tmp_path / "results.csv"))) == [FIGURE]


def test_of_each_subject_the_last_run_counts(tmp_path, monkeypatch):
    file = tmp_path / "results.csv"
    for time, figures in (("1", [FIGURE, PEAK, replace(FIGURE, subject="N 6")]), ("2", [replace(FIGURE, value=9.0)])):
        origin = {"machine": "m", "versions": "v", "commit": "c", "time": time}
        monkeypatch.setattr("bench.results.origin", lambda origin=origin: origin)
        list(append(figures, file))
    last, other = sorted(read(file), key=lambda figure: figure.value, reverse=True)
    assert (last.value, last.origin, other.subject) == (9.0, "m; v; c; 2", "N 6")


def test_a_file_with_other_columns_is_named(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"csv: .*other.csv must have the columns bench, setting.*, got \['a', 'b'\]"):
        read(tmp_path / "other.csv")


def strip(figure: Figure) -> Figure:
    return replace(figure, origin="")

"""Each figure is a row of the results file, of each subject the last run counts, and tables are made of the rows."""

import csv
from dataclasses import replace

import pytest
import torch

from bench.results import COLUMNS, SUMMARY, Figure, append, by_table, document, read, table
from cge_fast.errors import UserError

FIGURE = Figure("loss", "B 4", "N 5", "eager", "step", "s", 2.0, 1.5, 2.5)
PEAK = Figure("loss", "B 4", "N 5", "eager", "peak", "B", 7)
OURS = Figure("operators, step", "tiny", "stripe_pool", "cge_kernels", "step", "s", 2e-3, 1.9e-3, 2.1e-3)
EAGER = replace(OURS, contender="eager", value=5e-3, low=4e-3, high=6e-3)
FLOOR = replace(OURS, contender="floor", value=1e-4, low=None, high=None)
NOWHERE = {"machine": "", "versions": "", "commit": "", "time": ""}


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
    assert [replace(figure, **NOWHERE) for figure in found] == [FIGURE, replace(PEAK, subject="N 6")]
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
    assert [replace(figure, **NOWHERE) for figure in read(tmp_path / "results.csv")] == [FIGURE]


def test_of_each_subject_the_last_run_counts(tmp_path, monkeypatch):
    file = tmp_path / "results.csv"
    for time, figures in (("1", [FIGURE, PEAK, replace(FIGURE, subject="N 6")]), ("2", [replace(FIGURE, value=9.0)])):
        origin = {"machine": "m", "versions": "v", "commit": "c", "time": time}
        monkeypatch.setattr("bench.results.origin", lambda origin=origin: origin)
        list(append(figures, file))
    last, other = sorted(read(file), key=lambda figure: figure.value, reverse=True)
    assert (last.value, last.time, other.subject) == (9.0, "2", "N 6")


def test_a_file_with_other_columns_is_named(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"csv: .*other.csv must have the columns bench, setting.*, got \['a', 'b'\]"):
        read(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2e-3, "s", "2 ms"), (0.99e-6, "s", "990 ns"), (1.0, "s", "1 s"), (3_514e6, "B", "3.51 GB"), (0, "B", "0 B"),
        (12.345, "%", "12.3 %"), (8192, "", "8,192"), (0.123456, "", "0.123"), (3.35e15, "FLOP", "3,350 TFLOP"),
    ],
)  # fmt: skip
def test_values_have_three_digits_and_a_prefix(value, unit, text):
    assert str(replace(PEAK, value=value, unit=unit)) == text


def cells(*figures: Figure) -> list[list[str]]:
    """The cells of the figures' table, without the rule."""
    lines = [line.strip("|").split("|") for line in table(figures).splitlines() if "--" not in line]
    return [[cell.strip() for cell in line] for line in lines]


def test_contenders_stand_side_by_side_with_ratios_to_ours():
    assert cells(OURS, EAGER, FLOOR) == [
        ["subject", "cge_kernels", "eager", "ratio", "floor"],
        ["stripe_pool", "2 ms", "5~ ms", "2.50x~", "100 us"],
    ]


def test_what_differs_tells_the_rows_apart():
    peak = replace(OURS, quantity="peak", unit="B", value=3_000_000, low=None, high=None)
    assert cells(OURS, peak, replace(peak, contender="eager", value=6_000_000)) == [
        ["quantity", "cge_kernels", "eager", "ratio"],
        ["step", "2 ms", "", ""],
        ["peak", "3 MB", "6 MB", "2.00x"],
    ]


def test_of_a_single_contender_quantities_stand_side_by_side():
    others = replace(FIGURE, subject="N 6", value=3.0), replace(PEAK, subject="N 6", value=8)
    assert cells(FIGURE, PEAK, *others) == [
        ["subject", "step", "peak"],
        ["N 5", "2~ s", "7 B"],
        ["N 6", "3~ s", "8 B"],
    ]


def test_of_rates_more_is_better_and_of_shares_there_is_no_ratio():
    rate = replace(FLOOR, contender="cge_kernels", quantity="images", unit="images/s", value=30.0)
    share = replace(rate, quantity="share of head", unit="%", value=50.0)
    found = cells(rate, replace(rate, contender="eager", value=10.0), share, replace(share, contender="eager"))
    assert [row[-1] for row in found] == ["ratio", "3.00x", ""]


def test_each_bench_is_a_table_and_readme_has_one_of_some_figures():
    label, (bench, setting, subject, quantity) = next(iter(SUMMARY.items()))
    ours = Figure(bench, setting, subject, "cge_kernels", quantity, "s", 1.0)
    found = by_table([ours, replace(ours, contender="eager"), replace(ours, contender="floor"), PEAK])
    assert {name: len(figures) for name, figures in found.items()} == {bench: 3, "loss": 1, "summary": 2}
    assert cells(*found["summary"]) == [["subject", "cge_kernels", "eager", "ratio"], [label, "1 s", "1 s", "1.00x"]]


def test_the_document_says_where_figures_are_from():
    parts = document([replace(OURS, machine="a CPU", versions="torch 2", commit="abc", time="today")]).split("\n\n")
    assert (parts[0], parts[2]) == ("## operators, step", "a CPU; torch 2; abc; today")

"""The page about several runs."""

import json
import re
import shutil

import pytest
from browser import assert_well_formed, needs_chromium

from cge_fast import compare, errors
from cge_fast.compare import names


@pytest.fixture
def runs(shared_run, tmp_path):
    """Two runs; the second without memory, evaluated worse and at another rate."""
    first, second = tmp_path / "one" / "first", tmp_path / "one" / "second"
    for run in (first, second):
        shutil.copytree(shared_run, run)
    config = second / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.002", "lr: 0.25"))
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"stripe_precision": None, "mAP": row["mAP"] and 0.125} for row in rows]
    (second / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return first, second


@pytest.fixture
def page(runs, tmp_path, capsys):
    compare.main([*map(str, runs), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    return tmp_path / "page.html"


def test_the_page_has_the_last_figures_and_the_settings_that_differ(page):
    rows = {
        name: re.findall("<td.*?>(.*?)</td>", cells)
        for name, cells in re.findall("<tr><th>(.*?)</th>(.*?)</tr>", page.read_text())
    }
    assert rows["first"][0] == "100.0%"
    assert rows["second"][0] == "12.5%"
    assert rows["optim.lr"] == ["0.002", "0.25"]
    assert "optim.epochs" not in rows


def test_a_chart_has_a_curve_for_each_run_that_has_the_figure(page):
    charts = dict(re.findall("<figcaption>(.*?)</figcaption>(.*?)</figure>", page.read_text()))
    shown = {title: re.findall("</svg>(first|second) ", chart) for title, chart in charts.items()}
    assert shown["mAP"] == shown["Loss, in all"] == ["first", "second"]
    assert shown["Precision of the stripes"] == ["first"]


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_all_of_it_at_any_width(page, tmp_path, width):
    assert_well_formed(page, tmp_path / "seen", width)


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    a, b, c = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"
    assert names([a, c]) == ["run", "other"]
    assert names([a, b, c]) == ["a/run", "b/run", "b/other"]
    assert names([a]) == ["run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs"),
        (["RUN", "/nix"], "run: /nix is not the folder of a run"),
        (["RUN", "RUN"], "is there twice"),
        (["RUN", "--output", "/nix/page.html"], "/nix/page.html"),
    ],
)
def test_wrong_calls_are_one_line(runs, capsys, arguments, message):
    arguments = [str(runs[0]) if argument == "RUN" else argument for argument in arguments]
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: compare.main(arguments), "cge_fast.compare")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

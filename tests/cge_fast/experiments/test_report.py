"""The table that is written from what trainings measured."""

import csv
import json

import pytest

from cge_fast.experiments import report
from cge_fast.experiments.runs import FINISHED, folder_of
from cge_fast.experiments.tables import TABLES, comparison

ROWS = comparison("BOT")


def fake(output, row, seed, mean_ap, weight=None):
    """What a training leaves that the report reads."""
    folder = folder_of(output, row, seed)
    folder.mkdir(parents=True)
    precision = None if weight is None else [0.25, 0.5]
    figures = {"epoch": 1, "mAP": mean_ap, "rank1": 2 * mean_ap, "stripe_precision": precision, "mean_weight": weight}
    (folder / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    (folder / FINISHED).write_text(json.dumps({"seconds": 60.0, "arguments": []}))


@pytest.fixture
def output(tmp_path):
    for number, row in enumerate(ROWS):
        for seed in range(3):
            fake(
                tmp_path, row, seed, 0.3 + 0.1 * seed + 0.01 * number, 0.7 + 0.01 * seed if "CGE" in row.name else None
            )
    return tmp_path


def cells(output, rows=ROWS, data="pedestrians", table="table3", seeds=3):
    return {line["row"]: line for line in report.lines_of(table, data, output, rows, seeds, ["--config", "x"])}


def test_figures_are_means_over_seeds_and_differences_are_paired_by_seed(output):
    cge, bot = cells(output)["CGE+BOT"], cells(output)["BOT"]
    assert cge["mAP %"] == "43.0 ± 10.0"
    assert cge["rank-1 %"] == "86.0 ± 20.0"
    assert cge["mAP less its baseline"] == "+3.0 ± 0.0"
    assert cge["mAP less baseline x mean w"] == "+1.0 ± 0.0"
    assert (cge["mean w"], cge["precision of M_i %"], cge["seeds"], cge["s a run"]) == ("0.710", "25 50", "3", "60")
    assert (bot["mAP less its baseline"], bot["mean w"], bot["precision of M_i %"]) == ("-", "-", "-")


def test_rows_without_a_training_are_dashes(output):
    line = cells(output, TABLES["table1"])["CGE, n = 12"]
    assert (line["mAP %"], line["mAP less its baseline"], line["seeds"]) == ("-", "-", "0")


def test_a_missing_seed_is_left_out_of_its_pairs(output):
    (folder_of(output, ROWS[3], 1) / FINISHED).unlink()
    line = cells(output)["CGE+BOT"]
    assert (line["seeds"], line["mAP %"], line["mAP less its baseline"]) == ("2", "43.0 ± 14.1", "+3.0 ± 0.0")


def test_the_papers_figures_stand_beside_and_the_rest_is_dashes(output):
    lines = cells(output, TABLES["table8"], "msmt17", "table8")
    assert lines["best of the paper"]["paper mAP / rank-1"] == "65.9 / 85.1"
    assert lines["best of the paper"]["mAP %"] == lines["AGW"]["mAP %"] == lines["BOT"]["paper mAP / rank-1"] == "-"


def test_markdown_and_csv_have_the_command_the_time_and_what_failed(output):
    command = ["python", "-m", "cge_fast.experiments", "table3"]
    text = report.write("table3", "pedestrians", output, ROWS, 3, ["--config", "x"], {("BOT", 1): "it broke"}, command)
    assert (output / "table3.md").read_text() == text
    assert "    python -m cge_fast.experiments table3\n" in text
    assert "18 minutes" in text, "6 rows, 3 seeds, a minute each"
    assert "Failed: BOT, seed 1: it broke" in text
    with (output / "table3.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row.name for row in ROWS]
    assert lines[2]["command"].endswith(
        "-m cge_fast.experiments.variants --config x --model.cge false --loss.variant scaled "
        "--loss.variant_args.scale MEAN_W"
    )
    assert lines[3]["command"].endswith("-m cge_fast.train --config x --model.cge true")

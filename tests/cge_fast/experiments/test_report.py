"""The table that is written from what trainings measured."""

import csv
import json

import pytest

from cge_fast.errors import UserError
from cge_fast.experiments import report
from cge_fast.experiments.presets import PRESETS, Place
from cge_fast.experiments.runs import FINISHED, PRECISION, folder_of
from cge_fast.experiments.tables import TABLES, Table, comparison

ROWS = comparison("BOT")


def fake(output, row, seed, mean_ap, weight=None):
    """What a training leaves that the report reads."""
    folder = folder_of(output, row, seed)
    folder.mkdir(parents=True)
    figures = {"epoch": 1, "mAP": mean_ap, "rank1": 2 * mean_ap, "mean_weight": weight}
    (folder / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    (folder / FINISHED).write_text(json.dumps({"seconds": 60.0, "arguments": []}))
    (folder / PRECISION).write_text(json.dumps([0.25 + 0.01 * seed, 0.5]))


@pytest.fixture
def place(tmp_path):
    for number, row in enumerate(ROWS):
        for seed in range(3):
            weight = 0.7 + 0.01 * seed if "CGE" in row.name else None
            fake(tmp_path, row, seed, 0.3 + 0.1 * seed + 0.01 * number, weight)
    return Place("pedestrians", PRESETS["small"]["pedestrians"], tmp_path, ["--config", "x"])


def cells(place, key="table5-controls", seeds=3):
    return {line["row"]: line for line in report.lines_of(key, TABLES[key], place, seeds)}


def test_figures_are_means_over_seeds_and_differences_are_paired_by_seed(place):
    lines = cells(place)
    cge, bot, scaled = lines["CGE+BOT"], lines["BOT"], lines["BOT, logits x mean w"]
    assert (cge["mAP %"], cge["rank-1 %"]) == ("41.0 ± 10.0", "82.0 ± 20.0")
    assert (cge["less its baseline"], cge["less baseline x mean w"]) == ("+1.0 ± 0.0", "-2.0 ± 0.0")
    assert (cge["mean w"], cge["seeds"], cge["s a run"]) == ("0.710", "3", "60")
    assert (bot["less its baseline"], bot["mean w"]) == ("-", "-")
    assert (scaled["less its baseline"], scaled["less baseline x mean w"]) == ("+3.0 ± 0.0", "-")


def test_a_missing_seed_is_left_out_of_its_pairs(place):
    (folder_of(place.output, ROWS[1], 1) / FINISHED).unlink()
    line = cells(place)["CGE+BOT"]
    assert (line["seeds"], line["mAP %"], line["less its baseline"]) == ("2", "41.0 ± 14.1", "+1.0 ± 0.0")


def test_rows_without_a_training_are_dashes(place):
    line = cells(place, "table1a")["CGE+UPT-BOT, n = 12"]
    assert (line["mAP %"], line["seeds"]) == ("-", "0")


def test_precision_is_that_of_the_trained_model_beside_the_papers(place):
    line = cells(place, "table1b")["CGE+UPT-BOT, n = 3"]
    assert (line["precision of M_i %"], line["paper, market1501"]) == ("26.0 50.0", "96.6 97.1 91.9")
    assert cells(place, "table1a")["CGE+UPT-BOT, n = 3"]["paper, market1501"] == "90.8 / 95.9"
    assert cells(place, "table2")["CGE"]["paper, msmt17"] == "97.8 92.3 82.0"


@pytest.mark.parametrize(
    ("data", "sets"),
    [
        ("msmt17", ["msmt17"]),
        ("pedestrians", ["market1501", "msmt17", "cuhk03-labeled", "cuhk03-detected"]),
    ],
)
def test_the_papers_figures_are_of_the_same_set_or_of_all_of_its_sets(tmp_path, data, sets):
    lines = cells(Place(data, PRESETS["paper"][data], tmp_path, []), "table9")
    assert [column for column in lines["AGW"] if column.startswith("paper")] == [f"paper, {name}" for name in sets]
    assert lines["CGE+UPT-AGW"]["paper, msmt17"] == "65.9 / 85.1"
    assert lines["SCSN"]["paper, msmt17"] == "58.5 / 83.8"
    assert lines["SCSN"]["mAP %"] == lines["AGW"]["mAP %"] == "-"
    assert ("BDB" in lines) == (data != "msmt17"), "it lists no figure of BDB there"
    assert list(lines)[:8] == [row.name for row in TABLES["table9"].rows]


def test_markdown_and_csv_have_the_command_the_time_and_what_failed(place):
    tables = {key: TABLES[key] for key in ("table5", "table5-controls")}
    text = report.write("table5 --preset small", tables, place, None, {("BOT", 1): "it broke"})
    assert (place.output / "table5.md").read_text() == text
    assert "    python -m cge_fast.experiments table5 --preset small\n" in text
    assert text.index("### table5: Losses") < text.index("### table5-controls: Controls")
    assert "18 minutes" in text, "6 rows, 3 seeds, a minute each"
    assert "Failed: BOT, seed 1: it broke" in text
    assert "| CE+Triplet | 86.3 / 94.4 | 40.0 ± 10.0 |" in text, "it is the training of BOT"
    with (place.output / "table5.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row.name for table in tables.values() for row in table.rows]


def test_a_column_without_a_figure_is_left_out_but_for_those_that_are_measured(tmp_path):
    place = Place("pedestrians", PRESETS["small"]["pedestrians"], tmp_path, [])
    text = report.write("table1", {"table1-controls": Table("Controls", ROWS, False, 3)}, place, 1, {})
    assert "| row | mAP % | rank-1 % | seeds |" in text


def test_table_8_shows_the_papers_differences_and_then_the_recipes_others():
    lines = report.of_recipes().splitlines()
    assert "| image | 256x128 | 384x128 | 256x128 | 384x128 |" in lines
    assert "| learning rate falls after | 40, 70 | 40, 90 | [40.0, 70.0] | [40.0, 90.0] |" in lines
    assert (
        "| BNNeck feature | after | before | test: after; metric loss: before | test: after; metric loss: before |"
        in lines
    )
    assert "| `loss.center_weight` |  |  | 0.0005 | 0.0 |" in lines
    assert not [line for line in lines if "model.cge`" in line or "data.height" in line]


def test_the_marked_part_of_a_file_becomes_the_tables(tmp_path):
    file = tmp_path / "results.md"
    file.write_text("before\n<!-- measured -->\nold\n<!-- end of measured -->\nafter\n")
    report.put(file, ["one \\1\n", "two\n"])
    assert file.read_text() == ("before\n<!-- measured -->\n\none \\1\n\ntwo\n\n<!-- end of measured -->\nafter\n")
    file.write_text("no marks")
    with pytest.raises(
        UserError, match=r"^into: .*results.md must have <!-- measured --> and <!-- end of measured -->"
    ):
        report.put(file, ["one"])

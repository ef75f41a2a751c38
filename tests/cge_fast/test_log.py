"""A run's figures on disk."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cge_fast.errors import UserError
from cge_fast.log import Log, read_rows


def test_rows_are_appended_as_they_come(tmp_path):
    log = Log(tmp_path / "run", None)
    log.write({"epoch": 1, "loss": 2.5, "levels": [0.5, 0.5], "mAP": None})
    log.write({"epoch": 2, "loss": 1.5, "levels": [0.25, 0.75], "mAP": 0.5})
    log.close()
    assert [row["loss"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [2.5, 1.5]


def test_going_on_drops_later_rows_and_a_line_cut_short(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"epoch": epoch}) + "\n" for epoch in (0, 1, 2, 3)) + '{"epoch": 4, "lo')
    log = Log(tmp_path, 2)
    log.write({"epoch": 3, "loss": 1.0})
    log.close()
    assert [row["epoch"] for row in read_rows(file)] == [0, 1, 2, 3]
    assert read_rows(file)[-1]["loss"] == 1.0


def test_the_last_rows_copy_is_written_again_and_dropped_rows_are_said(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 1}\n{"epoch": 2, "lo')
    Log(tmp_path, 2, {"epoch": 2, "loss": 1.0}).close()
    assert read_rows(file) == [{"epoch": 1}, {"epoch": 2, "loss": 1.0}]
    Log(tmp_path, 1).close()
    assert capsys.readouterr().err == f"{file}: dropped 1 rows after epoch 1\n"


def test_tensorboard_reads_what_is_written(tmp_path):
    for first in (1, 2):
        log = Log(tmp_path, first - 1 or None)
        for epoch in (first, first + 1):
            log.write({"epoch": epoch, "loss": 10.0 * first + epoch, "levels": [0.5, 0.25]})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 11), (2, 22), (3, 23)]
    assert board.Scalars("levels/1")[0].value == 0.25


def test_beginning_anew_drops_all_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    Log(tmp_path, None).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_closing_on_a_full_disk_does_not_hide_where_the_disk_is_full(tmp_path):
    log = Log(tmp_path, None)
    log.events.close()
    log.file = Path("/dev/full")
    log.events = log.file.open("wb")
    log.event(file_version="brain.Event:2")
    with pytest.raises(OSError, match=r"No space left on device: '/dev'"), closing(log):
        log.write({"epoch": 1})


NO_FIGURES = ['{"epoch": 1, "loss": "x"}', '{"epoch": 1, "loss": NaN}', '{"epoch": 1, "levels": [0.5, null]}']


@pytest.mark.parametrize("line", ["[" * 100_000, "garbage", "[1]", "{}", '{"epoch": "one"}', *NO_FIGURES])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: must be an object with the number of an epoch"):
        read_rows(file)

"""A run's figures on disk."""

import json

import pytest

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


def test_beginning_anew_drops_all_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    Log(tmp_path, None).close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["garbage", "[1]", "{}", '{"epoch": "one"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: must be an object with the number of an epoch"):
        read_rows(file)

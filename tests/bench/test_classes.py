"""Memory and time of the loss over the number of identities."""

import pytest

from bench import classes
from bench.cases import EAGER, OURS
from bench.classes import Point, rows


def test_both_are_measured_apart_and_ours_needs_less_memory(capsys, monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "1")
    size = ["--batch", "64", "--channels", "8", "--rounds", "1", "--markdown"]
    classes.main(["--classes", "4000", "--contenders", OURS, EAGER, *size])
    lines = capsys.readouterr().out.splitlines()
    ours, eager = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert (ours[:2], eager[:2]) == (["4,000", OURS], ["4,000", EAGER])
    # eager holds the scores of 3 stripes and the logits, 4 MiB, at least; ours half a mebibyte of each kind of scratch
    assert int(ours[2]) <= 1 < 4 <= int(eager[2])
    assert ours[-1] == "1.00"


def test_rows_by_hand():
    points = [Point(OURS, 1000, 3 << 20, 0.5, 1e9), Point(EAGER, 1000, 40 << 20, 1.0, 1e9)]
    # 9 products of 2 * 4 * 1000 * 8 FLOPs
    assert rows(points, batch=4, channels=8) == [
        ("1,000", OURS, "3", "0.50", "500.0", "0%", "1.00"),
        ("1,000", EAGER, "40", "1.00", "1000.0", "0%", "2.00"),
    ]
    (fast,) = rows([Point(OURS, 1000, 0, 9 * 2 * 4 * 1000 * 8 / 1e9, 2e9)], batch=4, channels=8)
    assert fast[5] == "50%"


@pytest.mark.parametrize("contender", [OURS, EAGER])
def test_one_contender_as_json(contender, capsys):
    classes.main(["--contenders", contender, "--classes", "50", "--batch", "4", "--channels", "4", "--json"])
    assert f'"contender": "{contender}"' in capsys.readouterr().out

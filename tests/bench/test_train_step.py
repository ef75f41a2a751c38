"""The benchmark of the training step runs on a tiny set and its parts add up; no time is asserted."""

import pytest
from jsonargparse import ArgumentError

from bench import train_step
from cge_fast.data import pedestrians, sets
from cge_fast.errors import UserError

TINY = train_step.Setting("compact", height=24, width=16, identities=2)
LAPS = {
    "waiting for data",
    "backbone forward",
    "head forward and losses",
    "head backward",
    "backbone backward",
    "optimiser",
    "memory write",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache in which the embedded set has 24 training images: six batches."""
    folder = tmp_path_factory.mktemp("cache")
    pedestrians.draw(
        folder / f"pedestrians-{sets.DRAWING}", train_identities=4, test_identities=4, images_per_identity=6
    )
    return folder


@pytest.fixture(autouse=True)
def tiny(cache, monkeypatch):
    monkeypatch.setenv("CGE_CACHE", str(cache))
    monkeypatch.setattr(train_step, "SETTINGS", {"tiny": TINY})
    monkeypatch.setattr(train_step, "INSTANCES", 2)


def row(kernels: str, steps: list[float]) -> train_step.Row:
    """Of 10 images a step, of which each part takes its share of the milliseconds."""
    shares = {
        "waiting for data": 0.1,
        "backbone forward": 0.5,
        "head forward and losses": 0.1,
        "head backward": 0.2,
        "memory write": 0.1,
    }
    return train_step.Row("any", kernels, 10, {part: [share * ms for ms in steps] for part, share in shares.items()})


def test_every_part_of_every_step_is_measured_beyond_an_epoch_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = train_step.measure("tiny", TINY, steps=3)
    assert [(row.setting, row.kernels, row.batch) for row in rows] == [("tiny", "reference", 4), ("tiny", "fused", 4)]
    for row in rows:
        assert set(row.parts) == LAPS
        assert all(len(values) == 3 and min(values) >= 0 for values in row.parts.values())
        assert sum(row.share(part) for part in row.parts) == pytest.approx(1)
        assert set(train_step.HEAD) < LAPS
    assert not list(tmp_path.iterdir())


def test_figures_follow_from_the_parts():
    reference, fused = row("reference", [100.0, 120.0, 110.0]), row("fused", [50.0, 60.0, 55.0])
    assert fused.milliseconds() == pytest.approx([50, 60, 55])
    assert fused.milliseconds("head backward", "memory write") == pytest.approx([15, 18, 16.5])
    assert fused.share(*train_step.HEAD) == pytest.approx(0.4)
    assert fused.images_per_second() == pytest.approx(1e3 * 10 / 55)
    assert train_step.ratio(reference, fused) == "any: fused over reference, images/s: 2.00x"


def test_figures_that_spread_are_marked():
    calm, wild = row("reference", [100.0, 100.0, 100.0]), row("fused", [50.0, 100.0, 150.0])
    assert [cell.count("~") for cell in train_step.cells(calm)[3:]] == [0, 0, 0, 0]
    assert [cell.count("~") for cell in train_step.cells(wild)[3:]] == [1, 1, 1, 1]
    assert train_step.ratio(calm, wild).endswith("1.00x~")


def test_it_prints_a_row_for_each_set_of_operators_and_the_ratio(capsys):
    train_step.main(["--steps", "1", "--identities", "3"])
    header, reference, fused, empty, ratio = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["setting", "batch", "kernels", "images/s"]
    assert reference.split()[:3] == ["tiny", "6", "reference"]
    assert fused.split()[:3] == ["tiny", "6", "fused"]
    assert empty == ""
    assert ratio.startswith("tiny: fused over reference")


def test_wrong_options_are_answered_with_what_is_wanted():
    with pytest.raises(ArgumentError, match=r"settings.*vgg.*tiny"):
        train_step.main(["--settings", "vgg"])
    with pytest.raises(UserError, match=r"data\.identities: a batch needs 9, the training split has 4"):
        train_step.main(["--identities", "9"])

"""The benchmark of the training step runs on a tiny set and its parts add up; no time is asserted."""

import pytest

from bench import step
from bench.cases import EAGER, OURS
from cge_fast.data import pedestrians, sets
from cge_fast.errors import UserError
from cge_fast.options import DataConfig

TINY = DataConfig(height=24, width=16, identities=2, instances=2)


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
    monkeypatch.setattr(step, "SETTINGS", {"compact": TINY})


def test_every_step_is_measured_beyond_an_epoch_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = step.timed_steps("compact", TINY, steps=7)
    assert list(found) == [OURS, EAGER]
    for parts in found.values():
        assert {part: len(seconds) for part, seconds in parts.items()} == {"step": 7, "head": 7, "waiting for data": 7}
        for whole, head, waiting in zip(*parts.values(), strict=True):
            assert head > 0
            assert waiting >= 0
            assert head + waiting < whole
    assert not list(tmp_path.iterdir())


def test_figures_follow_from_the_parts(monkeypatch):
    parts = {"step": [0.1, 0.2, 0.4], "head": [0.04, 0.08, 0.16], "waiting for data": [0.01, 0.02, 0.04]}
    monkeypatch.setattr(step, "timed_steps", lambda backbone, data, steps: {OURS: parts})
    figures = list(step.measure(["compact"], steps=3, identities=5))
    assert [(figure.quantity, figure.unit) for figure in figures] == [
        ("images", "images/s"), ("step", "s"), ("share of head", "%"), ("share of waiting for data", "%"),
    ]  # fmt: skip
    assert [figure.value for figure in figures] == pytest.approx([10 / 0.2, 0.2, 40, 10])
    assert figures[0].setting == "B 10, 24x16"
    assert [figure.mark for figure in figures] == ["~", "~", "", ""]


def test_too_many_identities_are_named():
    with pytest.raises(UserError, match=r"data\.identities: a batch needs 9, the training split has 4"):
        list(step.measure(["compact"], steps=1, identities=9))

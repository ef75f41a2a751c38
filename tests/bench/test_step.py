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
    figures = {(one.contender, one.quantity): one for one in step.measure(["compact"], steps=7, identities=None)}
    assert {name for name, _ in figures} == {OURS, EAGER}
    for contender in (OURS, EAGER):
        images, whole, head, waiting = (
            figures[contender, quantity] for quantity in ("images", "step", "head", "waiting")
        )
        assert images.setting == "B 4, 24x16"
        assert [figure.unit for figure in (images, whole, head, waiting)] == ["images/s", "s", "%", "%"]
        assert images.value == pytest.approx(4 / whole.value)  # of 7 steps the medians are the same step's
        assert 0 < head.low <= head.high < 100
        assert 0 <= waiting.low <= waiting.high < 100
    assert not list(tmp_path.iterdir())


def test_too_many_identities_are_named():
    with pytest.raises(UserError, match=r"data\.identities: a batch needs 9, the training split has 4"):
        list(step.measure(["compact"], steps=1, identities=9))

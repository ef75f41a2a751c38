"""The benchmark of the whole program runs on a tiny set, all contenders on the same images; no time is asserted."""

import pytest
import torch

from bench import program
from bench.program import Pictures
from cge_fast import data
from cge_fast.compiled import missing_compiler
from cge_fast.data import pedestrians, sets
from cge_fast.data.batches import plain_batches
from cge_fast.options import DataConfig

TINY = DataConfig(height=24, width=16, identities=2, instances=2, workers=0)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    folder = tmp_path / f"pedestrians-{sets.DRAWING}"
    pedestrians.draw(folder, train_identities=4, test_identities=4, images_per_identity=6)
    monkeypatch.setenv("CGE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, value in (("STEP", TINY), ("LOADER", TINY), ("BATCHES", 2), ("BACKBONE", "compact")):
        monkeypatch.setattr(program, name, value)


def test_the_loader_is_measured_beside_torchvisions(tmp_path):
    figures = list(program.measure(["loader"], rounds=2))
    places = {(one.subject, one.contender) for one in figures}
    assert places == {(f"data.cache {cache}", who) for cache in ("none", "ram") for who in ("cge_fast", "torchvision")}
    assert all(one.unit == "images/s" and one.value > 0 for one in figures)
    assert [path.name for path in tmp_path.iterdir()] == [f"pedestrians-{sets.DRAWING}"]


def test_without_augmentation_both_load_the_same(monkeypatch):
    config = DataConfig(height=24, width=16, flip=0, pad=0, erasing=0, workers=0)
    images = data.read(config, ["train"]).train
    (ours,) = plain_batches(images, len(images), config, torch.device("cpu"), "ours")
    theirs = Pictures(images, [0] * len(images), config)
    for index, image in enumerate(ours):
        torch.testing.assert_close(theirs[index][0], image)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_compiler()), reason="no compiler")
def test_the_step_is_measured_with_and_without(tmp_path):
    figures = list(program.measure(["step"], rounds=1))
    assert [one.contender for one in figures] == [*program.programs()]
    assert all(one.unit == "images/s" and one.value > 0 for one in figures)

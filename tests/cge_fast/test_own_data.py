"""Crops of one's own, from a folder of identities to an evaluated network."""

import json
import shutil

import pytest
from runs import rows, run
from support import write_crops

import cge_fast
from cge_fast import evaluate
from cge_fast.analyze.ranked import ranked
from cge_fast.analyze.trained import open_checkpoint

SMALL = [
    *("--model.backbone", "compact", "--model.pretrained", "false", "--data.height", "24", "--data.width", "16"),
    *("--data.identities", "4", "--data.instances", "2", "--data.workers", "0", "--optim.epochs", "2"),
    *("--optim.precision", "float32"),
]


@pytest.fixture
def crops(market, tmp_path):
    """Eight identities, all in train."""
    root = write_crops(market, tmp_path / "crops")
    for split in ("query", "gallery"):
        shutil.copytree(root / split, root / "train", dirs_exist_ok=True)
        shutil.rmtree(root / split)
    return root


@pytest.fixture
def output(crops, tmp_path, capsys):
    """A run of the recipe `own`."""
    arguments = ["--config", "own", "--data.root", str(crops), "--output", str(tmp_path / "run"), *SMALL]
    status, out, err = run(arguments, capsys)
    assert status == 0
    assert "2 of its 8 identities (12 of 48 images) are held out as query and gallery" in err
    assert "36 images of 6 identities to train on, 6 queries, 12 gallery images" in err
    assert out.startswith("mAP ")
    return tmp_path / "run"


def test_the_recipe_trains_on_a_folder_and_evaluates_on_people_it_held_out(output, capsys):
    names = cge_fast.load(output, "cpu").names
    assert len(names["identities"]) == 6
    assert names["cameras"] == ["c1", "c2", "c3"]
    trained = rows(output)[-1]["mAP"]
    evaluate.main(["--checkpoint", str(output), "--output", "json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["mAP"], row["queries"]) == (pytest.approx(trained), 6)
    status, _, _ = run(["--output", str(output), "--resume", "--optim.epochs", "3"], capsys)
    assert status == 0
    assert cge_fast.load(output, "cpu").names == names


def test_pictures_and_tables_call_people_and_cameras_by_their_names(output, tmp_path):
    written = ranked(open_checkpoint(output), tmp_path)
    head, first, *_ = written.table.read_text().splitlines()
    row = dict(zip(head.split(","), first.split(","), strict=True))
    identity, image = row["query"].split("/")[-2:]
    assert (row["query_identity"], row["query_camera"]) == (identity, image[:2])
    assert row["identity"] == row["image"].split("/")[-2]
    assert identity not in cge_fast.load(output, "cpu").names["identities"]


def test_sets_without_names_leave_none(shared_run):
    assert cge_fast.load(shared_run, "cpu").names == {}
    assert not (shared_run / "checkpoints" / "last" / "names.json").exists()

"""Going on with a run: with what it had, and not with what does not belong to it."""

import errno
import os
import shutil

import pytest
import torch
from conftest import small_options
from runs import rows, run

from cge_fast import backbones, checkpoint, errors, evaluate, train
from cge_fast.cli import read_settings


def test_a_checkpoint_with_other_classes_is_refused(trained, market, tmp_path):
    for path in (market / "bounding_box_train").glob("0001_*"):
        path.unlink()
    with pytest.raises(errors.UserError, match=r"data: checkpoint .* has 4 classes, the data set 3"):
        train.main(["--output", str(tmp_path / "run"), "--resume", "--data.identities", "3"])


def test_images_of_other_people_are_not_gone_on_with(trained, market, capsys):
    for path in sorted((market / "bounding_box_train").glob("0001_*")):
        path.rename(path.with_name(path.name.replace("0001", "0009")))
    status, _, err = run(["--output", str(trained), "--resume", "--optim.epochs", "3"], capsys)
    assert status == 2
    assert "data: the images or their identities are not those that" in err


def test_images_of_the_test_may_change(trained, market, capsys):
    """Their figures count anew; training goes on as if nothing had been."""
    for path in sorted((market / "query").glob("0005_*")):
        path.unlink()
    best = checkpoint.read_manifest(trained / "checkpoints" / "best")["epoch"]
    status, out, err = run(["--output", str(trained), "--resume"], capsys)
    assert status == 0
    assert "data: queries or gallery have changed: figures, and the choice of `best`, are of the new ones" in err
    assert out.startswith("mAP"), "the last epoch is evaluated again"
    assert "untrained" not in out, "whose figures were of the others"
    assert best == 2, "from here on"
    more = ["--output", str(trained), "--resume", "--optim.epochs", "3"]
    status, _, err = run(more, capsys)
    assert status == 0
    assert checkpoint.read_manifest(trained / "checkpoints" / "best")["epoch"] == 3, "whatever the old ones' mAP was"
    assert run(more, capsys)[2].count("have changed") == 0


def test_other_people_and_cameras_in_the_test_leave_the_training_what_it_was(market, tmp_path, capsys):
    """Though they change the numbers of all identities and cameras."""
    root = tmp_path / "own"
    for path in market.glob("*/*.png"):
        person, camera, _ = path.name.split("_", 2)
        split = (
            "train"
            if path.parent.name == "bounding_box_train"
            else path.parent.name.replace("bounding_box_test", "gallery")
        )
        (root / split / person).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / split / person / f"{camera[:2]}_{path.name.split('_')[2]}.png")
    options = [*small_options(root, tmp_path / "run"), "--data.name", "folder"]
    assert run(options, capsys)[0] == 0
    for split in ("query", "gallery"):
        (root / split / "0000").mkdir()
    shutil.copy(path, root / "query" / "0000" / "a_1.png")
    shutil.copy(path, root / "gallery" / "0000" / "b_1.png")
    status, _, err = run(["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "3"], capsys)
    assert status == 0, err
    assert "have changed" in err


def test_fewer_epochs_than_are_done_are_refused(trained, capsys):
    status, _, err = run(["--output", str(trained), "--resume", "--optim.epochs", "1"], capsys)
    assert status == 2
    assert "optim.epochs: 1, but the run has done 2" in err


def test_going_on_needs_no_weights_that_the_run_began_with(options, tmp_path, capsys):
    torch.save(backbones.build("compact").state_dict(), tmp_path / "start.pth")
    assert run([*options, "--model.weights", str(tmp_path / "start.pth")], capsys)[0] == 0
    (tmp_path / "start.pth").unlink()
    assert run(["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "3"], capsys)[0] == 0
    saved = read_settings(tmp_path / "run" / "checkpoints" / "last" / "config.yaml")
    assert saved.model.weights == tmp_path / "start.pth", "it is still known what the run began with"


def test_a_run_that_was_copied_without_links_and_lost_a_row_goes_on(trained, tmp_path, capsys):
    copied = shutil.copytree(trained, tmp_path / "copied")
    file = copied / "metrics.jsonl"
    before = rows(copied)
    file.write_bytes(file.read_bytes()[:-20])
    assert run(["--output", str(copied), "--resume", "--optim.epochs", "3"], capsys)[0] == 0
    assert rows(copied)[:-1] == before
    assert evaluate.main(["--checkpoint", str(copied)]) is None


def test_a_changed_setting_counts_when_a_run_goes_on(trained, tmp_path, capsys):
    run(["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "3", "--optim.weight_decay", "0.25"], capsys)
    state = checkpoint.load_training(tmp_path / "run" / "checkpoints" / "last")
    assert state["epoch"] == 3
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


def test_a_run_goes_on_with_another_backend(trained, capsys):
    last = trained / "checkpoints" / "last"
    assert read_settings(last / "config.yaml").backend == "auto"
    more = ["--output", str(trained), "--resume", "--optim.epochs", "3", "--backend", "reference"]
    assert run(more, capsys)[0] == 0
    assert read_settings(last / "config.yaml").backend == "reference"


@pytest.mark.usefixtures("same_bits")
def test_resuming_a_finished_run_says_its_result_again(trained, options, tmp_path, capsys):
    _, out, _ = run([*options, "--output", str(tmp_path / "again")], capsys)
    assert run(["--output", str(trained), "--resume"], capsys)[1] == out.replace("again", "run")


def test_a_full_disk_is_one_line_that_names_what_there_is(trained, capsys, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("cge_fast.files.write", full)
    monkeypatch.setattr("cge_fast.files.replace", lambda path, content: None)
    status, _, err = run(["--output", str(trained), "--resume", "--optim.epochs", "3"], capsys)
    assert status == 2
    message = err.strip().splitlines()[-1]
    assert message.startswith("cge_fast.train: error: ")
    assert f"No space left on device; the last checkpoint is {trained}/checkpoints/last, of epoch 2" in message
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"last", "best"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.stripes", "2"], "model.stripes: checkpoint .* has 3 stripes, the settings want 2"),
        (["--model.cge", "false"], "model.cge: checkpoint .* has a memory, the settings want none"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(trained, tmp_path, change, message):
    with pytest.raises(errors.UserError, match=message):
        train.main(["--output", str(tmp_path / "run"), "--resume", *change])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b"garbage\n", "metrics.jsonl, line 1: must be an object with the number of an epoch"),
        ("metrics.jsonl", b"[1]\n", "metrics.jsonl, line 1"),
        ("checkpoints/last/training.pt", b"", "training.pt is damaged"),
        ("checkpoints/last/model.safetensors", b"x", "model.safetensors is damaged"),
        ("checkpoints/last/loss.safetensors", b"x", "loss.safetensors is damaged"),
        ("checkpoints/last/config.yaml", b"\xff", "config"),
    ],
)
def test_a_damaged_run_is_not_resumed(trained, tmp_path, capsys, name, content, message):
    (tmp_path / "run" / name).write_bytes(content)
    status, _, err = run(["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "3"], capsys)
    assert status == 2
    assert message in err.strip().splitlines()[-1]

"""What the first edition gave: trainings, checkpoints, settings. The fixtures are its numbers."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from support import WITHOUT_GPU

from cge_fast import checkpoint, data, train
from cge_fast.build import load_model
from cge_fast.cli import read_settings
from cge_fast.evaluation.features import embed, evaluate

FIXTURES = Path(__file__).parent / "fixtures"
TRAINING = json.loads((FIXTURES / "training_first_edition.json").read_text())
CHECKPOINTS = json.loads((FIXTURES / "checkpoints_first_edition.json").read_text())
ROWS = {"alpha": "momentum", "centre": "center", "levels": "num_stripes_correct"}  # names in metrics.jsonl
TENSORS = {"head.p": "pool.p", "head.classifier.weight": checkpoint.CLASSIFIER, "head.memory": checkpoint.MEMORY}
# The loss adds up in another order since, and 93 steps of Adam with a learning rate of 2e-3 magnify the rounding. So
# losses are near, and accuracies of a few samples are not compared.
TOLERANCES = {"loss": 0.05, "classification": 0.02, "metric": 0.2, "label_weight": 0.05, "mean_weight": 0.05}


def present_name(name: str) -> str:
    return TENSORS.get(name, name.replace("head.neck", "neck"))


def tensors_of(folder: Path) -> set[str]:
    return (checkpoint.load_model(folder) | checkpoint.load_loss(folder)).keys()


def assert_row(found: dict, expected: dict) -> None:
    expected = {ROWS.get(name, name): value for name, value in expected.items()}
    assert found.keys() == expected.keys() | {"seconds", "images_per_second"}
    for name in ("epoch", "lr", "momentum"):
        assert found[name] == expected[name]
    for name, tolerance in TOLERANCES.items():
        if expected[name] is not None:
            assert found[name] == pytest.approx(expected[name], rel=tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cge", "bot", "cge_sharded"])
def test_trainings_come_out_as_they_did(name, tmp_path):
    expected = TRAINING[name]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if "sharded" in name else []
    recipe = "pedestrians_bot" if name == "bot" else "pedestrians_cge"
    command = [
        *(sys.executable, *launcher, "-m", "cge_fast.train", "--config", recipe, "--output", str(tmp_path)),
        *("--optim.epochs", "3", "--optim.precision", "float32", "--evaluation.every", "0", "--data.workers", "0"),
        *("--evaluation.untrained", "false", "--data.height", "48", "--data.width", "24"),
        *(["--model.shard_classes", "true"] if "sharded" in name else []),
    ]
    subprocess.run(command, env=os.environ | WITHOUT_GPU | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for found, wanted in zip(rows, expected["metrics"], strict=True):
        assert_row(found, wanted)
    assert tensors_of(tmp_path / "checkpoints" / "last") == {present_name(old) for old in expected["tensors"]}


@pytest.fixture(scope="module")
def first_edition(tmp_path_factory, shared_market) -> Path:
    """The first edition's runs, beside the set that they were trained on."""
    folder = tmp_path_factory.mktemp("first_edition")
    with tarfile.open(FIXTURES / "checkpoints_first_edition.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for last in folder.glob("*/checkpoints/last"):  # a link, as it was
        last.rename(last.with_name("epoch_0002"))
        last.symlink_to("epoch_0002")
    (folder / "market").symlink_to(shared_market)
    return folder


RUNS = ["cge_gem", "bot", "sharded"]


@pytest.mark.parametrize("name", RUNS)
def test_its_checkpoints_give_the_same_embeddings(first_edition, monkeypatch, name):
    monkeypatch.chdir(first_edition)
    last = first_edition / name / "checkpoints" / "last"
    trained = read_settings(checkpoint.config_file(last))
    model, images = load_model(last, trained, trained.data, torch.device("cpu")), data.read(trained.data)
    embeddings = embed(model, images.query, trained.data, trained.evaluation, "query")
    expected = torch.tensor(CHECKPOINTS[name]["query_embeddings"])
    assert checkpoint.identities(last) == 4
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-4)
    assert evaluate(model, images, trained.data, trained.evaluation).mAP == pytest.approx(CHECKPOINTS[name]["mAP"])


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("name", RUNS)
def test_its_runs_are_resumed(first_edition, tmp_path, monkeypatch, name):
    monkeypatch.chdir(first_edition)
    shutil.copytree(first_edition / name, tmp_path / "run", symlinks=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the fixture was made
    whole = ("--model.shard_classes", "false", "--model.shard_checkpoints", "false")
    train.main(["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "3", *whole])
    torch.set_num_threads(threads)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert_row(row, CHECKPOINTS[name]["resumed_row"])
    # all centres are there, which the fixture has not
    tensors = tensors_of(tmp_path / "run" / "checkpoints" / "last") - {"center.centers"}
    assert tensors == {present_name(old) for old in CHECKPOINTS[name]["resumed_tensors"]}

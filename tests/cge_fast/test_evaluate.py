"""python -m cge_fast.evaluate"""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from runs import refused
from support import WITHOUT_GPU, write_crops

import cge_fast
from cge_fast import checkpoint, data, embed, errors, evaluate
from cge_fast.cli import as_dataclass, read_settings, to_yaml
from cge_fast.evaluation.features import evaluate as evaluate_set
from cge_fast.evaluation.ranking import evaluate_ranking
from cge_fast.evaluation.reranking import evaluate_reranking
from cge_fast.options import TRAINING_ONLY
from cge_fast.wanted import TYPES


@pytest.fixture
def last(trained, capsys):
    capsys.readouterr()
    return trained / "checkpoints" / "last"


def evaluated(capsys, *arguments) -> str:
    evaluate.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.strip()


def test_the_settings_are_the_checkpoints_unless_given(last, capsys):
    plain = evaluated(capsys, "--checkpoint", last)
    assert plain == evaluated(
        capsys, "--checkpoint", last, "--evaluation.metric", "cosine", "--evaluation.neck", "after"
    )
    assert plain.endswith("(4 queries, 0 more without a match left out)")
    for name in ("mAP", "mINP", "rank-1", "rank-5", "rank-10"):
        assert name in plain


def test_what_only_training_reads_is_neither_listed_nor_taken(last, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    listed = set(re.findall(r"--(\w+\.\w+)", capsys.readouterr().out))
    assert listed == {name for name in TYPES if name.startswith(("data.", "evaluation."))} - TRAINING_ONLY
    with pytest.raises(errors.UserError, match=r"^data.erasing is not read here$"):
        evaluate.main(["--checkpoint", str(last), "--data.erasing", "0"])
    monkeypatch.setattr("cge_fast.evaluate.as_dataclass", lambda *arguments: without_unlisted(as_dataclass(*arguments)))
    assert evaluated(capsys, "--checkpoint", last).startswith("mAP")


def without_unlisted(config):
    """Settings that have no more than what is listed, so that to read another one fails."""
    for section in ("data", "evaluation"):
        values = vars(getattr(config, section)).items()
        listed = {name: value for name, value in values if f"{section}.{name}" not in TRAINING_ONLY}
        setattr(config, section, SimpleNamespace(**listed))
    return config


def test_metric_neck_and_flip_change_what_is_compared(last, capsys, monkeypatch):
    features = []
    monkeypatch.setattr("cge_fast.evaluation.features.evaluate_ranking", spy(features))
    for options in (
        [],
        ["--evaluation.neck", "before"],
        ["--evaluation.flip_test", "true"],
        ["--evaluation.metric", "euclidean"],
    ):
        evaluated(capsys, "--checkpoint", last, *options)
    after, before, flipped, euclidean = features
    assert not torch.allclose(after[0], before[0])
    assert not torch.allclose(after[0], flipped[0])
    assert torch.equal(after[0], euclidean[0])
    assert [metric for _, metric in features] == ["cosine", "cosine", "cosine", "euclidean"]


def spy(features, evaluated=evaluate_ranking):
    def remember(query, *others, metric, progress):
        features.append((query, metric))
        return evaluated(query, *others, metric=metric)

    return remember


def test_rerank_evaluates_the_same_features_by_their_reranked_distances(last, capsys, monkeypatch):
    plain, reranked = [], []
    monkeypatch.setattr("cge_fast.evaluation.features.evaluate_ranking", spy(plain))
    monkeypatch.setattr("cge_fast.evaluation.features.evaluate_reranking", spy(reranked, evaluate_reranking))
    evaluated(capsys, "--checkpoint", last)
    shown = evaluated(capsys, "--checkpoint", last, "--evaluation.rerank", "true", "--evaluation.metric", "euclidean")
    assert shown.endswith("(4 queries, 0 more without a match left out)")
    assert ([metric for _, metric in plain], [metric for _, metric in reranked]) == (["cosine"], ["euclidean"])
    assert torch.equal(plain[0][0], reranked[0][0])


def test_queries_without_a_match_are_counted(last, market, capsys):
    PIL.Image.new("RGB", (16, 24)).save(market / "query" / "0099_c1s1_000000_00.png")
    assert evaluated(capsys, "--checkpoint", last).endswith("(4 queries, 1 more without a match left out)")


def test_a_network_trained_in_float16_is_evaluated_on_a_cpu(last, capsys):
    settings = read_settings(last / "config.yaml")
    settings.optim.precision = "float16"
    (last / "config.yaml").write_text(to_yaml(settings))
    assert evaluated(capsys, "--checkpoint", last).startswith("mAP")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint: give --checkpoint, or features by --query and --gallery"),
        (["--query", "a.npz"], "checkpoint: give --checkpoint, or features by --query and --gallery"),
        (["--checkpoint", "LAST", "--query", "a.npz"], "checkpoint: give --checkpoint, or features by --query and"),
        (["--query", "a.npz", "--gallery", "b.npz"], "query: must be a file of features that ends in .npz or .parquet"),
        (["--checkpoint", "LAST", "--data.name", "folder+nix"], "data.name: there is no data set nix, but pedestrians"),
        (["--checkpoint", "LAST", "--data.name", "nix"], "market, or several of them, like a+b, got nix"),
        (["--checkpoint", "/nix"], "checkpoint /nix has no file model.safetensors"),
        (["--checkpoint", "LAST", "--data.root", "/nix"], "data.root: there is no folder /nix/query"),
        (["--checkpoint", "LAST", "--evaluation.metric", "l1"], "evaluation.metric"),
        (["--checkpoint", "LAST", "--config", "pedestrians_cge"], "--config"),
    ],
)
def test_wrong_calls_are_one_line(last, capsys, arguments, message):
    arguments = [str(last) if argument == "LAST" else argument for argument in arguments]
    assert message in refused(evaluate.main, "cge_fast.evaluate", arguments, capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("without_gpu")
def test_under_torchrun_the_ranks_share_the_work_and_one_prints(last, capsys):
    alone = evaluated(capsys, "--checkpoint", last)
    command = [sys.executable, "-m", "cge_fast.torchrun", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "cge_fast.evaluate", "--checkpoint", str(last)]
    environment = os.environ | WITHOUT_GPU | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == alone
    done = subprocess.run([*command, "--data.root", "/nix"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("data.root: there is no folder /nix") == 1
    assert "Traceback" not in done.stderr


def test_weights_of_another_network_are_refused(last):
    safetensors.torch.save_file({"fc.weight": torch.zeros(2, 2)}, last / checkpoint.MODEL)
    (last / checkpoint.MANIFEST).unlink()
    with pytest.raises(errors.UserError, match=r"has no neck.weight: it is of another kind of network"):
        evaluate.main(["--checkpoint", str(last)])


def test_what_is_deployed_needs_neither_the_loss_nor_the_training_state(last, capsys):
    whole = evaluated(capsys, "--checkpoint", last)
    settings = read_settings(last / "config.yaml")
    settings.loss.variant, settings.loss.variant_args = "one_of_your_own", {"weight": 2.0}
    (last / "config.yaml").write_text(to_yaml(settings))
    for name in (checkpoint.LOSS, checkpoint.TRAINING):
        (last / name).unlink()
    assert evaluated(capsys, "--checkpoint", last) == whole


def test_a_network_is_evaluated_on_another_set_than_its_own(last, market, tmp_path, capsys):
    whole = evaluated(capsys, "--checkpoint", last)
    crops = write_crops(market, tmp_path / "crops")
    assert evaluated(capsys, "--checkpoint", last, "--data.name", "folder", "--data.root", crops) == whole


def test_several_sets_are_evaluated_each_by_itself(last, market, tmp_path, capsys):
    whole = evaluated(capsys, "--checkpoint", last)
    crops = write_crops(market, tmp_path / "crops")
    shutil.rmtree(crops / "query" / "0005")
    names = ["--data.name", "market1501+folder", "--data.root", f"{market}+{crops}"]
    own, other = evaluated(capsys, "--checkpoint", last, *names).splitlines()
    assert own == f"market1501: {whole}"
    assert other.startswith("folder: mAP ")
    assert other.endswith("(3 queries, 0 more without a match left out)")
    rows = json.loads(evaluated(capsys, "--checkpoint", last, *names, "--output", "json"))
    assert [(row["data"], row["queries"]) for row in rows] == [("market1501", 4), ("folder", 3)]


def test_json_is_all_that_is_printed_and_has_the_figures_unrounded(last, capsys):
    settings = read_settings(last / "config.yaml")
    retrieval = evaluate_model(last, settings)
    (row,) = json.loads(evaluated(capsys, "--checkpoint", last, "--output", "json"))
    assert row == {"data": "market1501", **retrieval.row(), "queries": 4, "skipped": 0}
    assert row["mINP"] == retrieval.mINP
    assert row["rank5"] == retrieval.rank(5)


def evaluate_model(last, settings):
    model = cge_fast.load(last, "cpu").model
    return evaluate_set(model, data.read(settings.data), settings.data, settings.evaluation)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_features_in_files_are_evaluated_as_their_network_is(last, tmp_path, capsys, form):
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="pip install 'cge-fast[search]'")
    files = {name: tmp_path / f"{name}.{form}" for name in ("query", "gallery")}
    for name, file in files.items():
        embed.main(["--checkpoint", str(last), "--split", name, "--output", str(file)])
    capsys.readouterr()
    arguments = [word for name, file in files.items() for word in (f"--{name}", file)]
    for options in ([], ["--evaluation.metric", "euclidean"], ["--evaluation.rerank", "true"]):
        assert evaluated(capsys, *arguments, *options) == evaluated(capsys, "--checkpoint", last, *options)
    (row,) = json.loads(evaluated(capsys, *arguments, "--output", "json"))
    assert row["data"] == str(files["query"])


@pytest.mark.parametrize("kind", [int, str])
def test_features_of_other_programs_may_have_labels_of_text_or_numbers(tmp_path, capsys, kind):
    query, gallery = np.eye(3, 4), np.eye(4)[[0, 0, 2, 1, 3]]
    labels = {"query": ([7, 8, 9], [1, 1, 1]), "gallery": ([7, 8, 7, 8, 0], [1, 2, 2, 2, 3])}  # 9 has no match
    for name, features in (("query", query), ("gallery", gallery)):
        identities, cameras = (np.array(values).astype(kind) for values in labels[name])
        np.savez(tmp_path / name, features=features, identities=identities, cameras=cameras)
    arguments = ["--query", tmp_path / "query.npz", "--gallery", tmp_path / "gallery.npz", "--output", "json"]
    (row,) = json.loads(evaluated(capsys, *arguments))
    # Of 7 the nearest is junk, the next another, and the match ties with two behind it. Of 8 one match is the nearest,
    # the other ties with one before it.
    assert (row["queries"], row["skipped"]) == (2, 1)
    assert row["mAP"] == pytest.approx((1 / 2 + (1 + 2 / 3) / 2) / 2)
    assert row["rank1"] == 1 / 2


def test_features_of_two_networks_are_not_compared(last, tmp_path, capsys):
    for name, options in (("query", []), ("gallery", ["--evaluation.flip_test", "true"])):
        output = ["--split", name, "--output", str(tmp_path / f"{name}.npz")]
        embed.main(["--checkpoint", str(last), *output, *options])
    with pytest.raises(errors.UserError, match=r"gallery: .* made with flip_test True, the queries' with False"):
        evaluated(capsys, "--query", tmp_path / "query.npz", "--gallery", tmp_path / "gallery.npz")


def test_a_set_without_a_training_split_is_evaluated(last, market, capsys):
    whole = evaluated(capsys, "--checkpoint", last)
    shutil.rmtree(market / "bounding_box_train")
    assert evaluated(capsys, "--checkpoint", last) == whole

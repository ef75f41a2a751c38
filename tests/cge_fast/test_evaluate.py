"""python -m cge_fast.evaluate"""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import PIL.Image
import pytest
import safetensors.torch
import torch

from cge_fast import checkpoint, errors, evaluate
from cge_fast.cli import as_dataclass, read_settings, to_yaml
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
    with pytest.raises(errors.UserError, match=r"^data.erasing is read in training alone$"):
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
        ([], "checkpoint"),
        (["--checkpoint", "/nix"], "checkpoint /nix has no file model.safetensors"),
        (["--checkpoint", "LAST", "--data.root", "/nix"], "data.root: there is no folder /nix/query"),
        (["--checkpoint", "LAST", "--evaluation.metric", "l1"], "evaluation.metric"),
        (["--checkpoint", "LAST", "--config", "pedestrians_cge"], "--config"),
    ],
)
def test_wrong_calls_are_one_line(last, capsys, arguments, message):
    arguments = [str(last) if argument == "LAST" else argument for argument in arguments]
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: evaluate.main(arguments), "cge_fast.evaluate")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_under_torchrun_the_ranks_share_the_work_and_one_prints(last, capsys):
    alone = evaluated(capsys, "--checkpoint", last)
    command = [sys.executable, "-m", "cge_fast.torchrun", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "cge_fast.evaluate", "--checkpoint", str(last)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout.strip() == alone
    done = subprocess.run([*command, "--data.root", "/nix"], capture_output=True, text=True)
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


def test_a_set_without_a_training_split_is_evaluated(last, market, capsys):
    whole = evaluated(capsys, "--checkpoint", last)
    shutil.rmtree(market / "bounding_box_train")
    assert evaluated(capsys, "--checkpoint", last) == whole

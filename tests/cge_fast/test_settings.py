"""Settings of the training program: wrong ones, files of them, and the names that options once had."""

from dataclasses import asdict

import pytest
import torch
import yaml
from runs import run
from support import GPU

from cge_fast import train
from cge_fast.build import check_cuda_graph
from cge_fast.cli import NOW_VARIANT, RENAMED, read_settings
from cge_fast.errors import UserError
from cge_fast.options import TrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--optim.epochs", "many"], 'Parser key "optim.epochs": Not of type BoundedPositiveInt'),
        (["--optim.epochs", "0"], 'Parser key "optim.epochs"'),
        (["--data.erasing", "1.5"], 'Parser key "data.erasing"'),
        (["--data.workers=-1"], 'Parser key "data.workers"'),
        (["--evaluation.batch", "0"], 'Parser key "evaluation.batch"'),
        (["--optim.epoch", "3"], "--optim.epoch"),
        (["--loss.margin", "hard"], 'Parser key "loss.margin"'),
        (["--data.root", "/nowhere"], "data.root: there is no folder /nowhere/bounding_box_train"),
        (["--data.name", "folder"], "market/train"),
        (["--data.identities", "5"], "data.identities: a batch needs 5, the training split has 4"),
        (["--model.stripes", "4"], "model.stripes: 4 do not fit the feature map, which has 3 rows"),
        (["--optim.accumulate", "4"], "loss.metric_weight: the metric loss needs 2 identities in a micro-batch"),
        (["--seed", str(2**63)], 'Parser key "seed"'),
        (["--output", "/dev/null/run"], "output: /dev/null/run cannot be made (Not a directory)"),
        (["--optim.accumulate", "3"], "optim.accumulate: 4 identities cannot be cut evenly into 3"),
        (["--optim.precision", "float16"], "optim.precision: float16 needs a GPU"),
        (["--model.pretrained", "true"], "model.pretrained: the backbone compact has no ImageNet weights"),
        (["--resume"], "has no file model.safetensors"),
        (["--config", "no_such_recipe"], "no_such_recipe"),
        (["--backend", "fast"], "Expected a typing.Literal['auto', 'triton', 'cpu', 'reference']. Got value: fast"),
        (["--loss.variant", "focal"], "loss.variant: must be empty; python -m cge_fast.experiments.variants has some"),
        (["--model.cge", "false", "--model.revision", "features"], "model.revision is now --loss.variant cge_feature"),
        (["--loss.classification", "sphere"], "loss.classification is now --loss.metric sphere, which adds SphereFace"),
        (["--model.cge", "false", "--model.shard_classes", "true"], "shard_classes needs cge and the loss CGELoss"),
    ],
)
def test_wrong_settings_are_one_line_and_leave_nothing_behind(options, tmp_path, capsys, change, message):
    status, out, err = run([*options, *change], capsys)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(GPU, reason="needs a computer without a GPU")
def test_a_cuda_graph_without_a_gpu_is_one_line_and_leaves_nothing_behind(options, tmp_path, capsys):
    status, _, err = run([*options, "--optim.cuda_graph", "true"], capsys)
    assert (status, err) == (2, "cge_fast.train: error: optim.cuda_graph: must be false, there is no GPU\n")
    assert not (tmp_path / "run").exists()


def test_a_cuda_graph_is_for_one_process_and_one_micro_batch(monkeypatch):
    config, gpu = TrainConfig(), torch.device("cuda")
    config.optim.cuda_graph = True
    check_cuda_graph(config, gpu)
    config.optim.accumulate = 2
    with pytest.raises(UserError, match=r"optim.cuda_graph: must be false, .* micro-batch: optim.accumulate"):
        check_cuda_graph(config, gpu)
    monkeypatch.setattr("cge_fast.build.world_size", lambda: 2)
    with pytest.raises(UserError, match=r"optim.cuda_graph: must be false, it is for one process"):
        check_cuda_graph(config, gpu)
    config.optim.cuda_graph = False
    check_cuda_graph(config, gpu)


def test_a_wrong_backend_is_one_line_and_leaves_nothing_behind(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CGE_BACKEND", "cuda")
    status, _, err = run(options, capsys)
    assert status == 2
    assert err == "cge_fast.train: error: CGE_BACKEND must be one of auto, triton, cpu, reference, got 'cuda'\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"optim: 5\n", "settings.yaml: optim must be a section of settings, got int"),
        (b"optim: {epoch: 3}\n", "'optim' does not accept option 'epoch'"),
        (b"optim: {epochs: three}\n", 'Parser key "optim.epochs"'),
        (b"optim: [\n", "config"),
        (b"\xff\xfe\x00", "config"),
    ],
)
def test_a_wrong_settings_file_is_one_line(options, tmp_path, capsys, content, message):
    (tmp_path / "settings.yaml").write_bytes(content)
    status, _, err = run([*options, "--config", str(tmp_path / "settings.yaml")], capsys)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_print_config_prints_settings_that_config_reads_back(options, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main([*options, "--print_config"])
    (tmp_path / "settings.yaml").write_text(capsys.readouterr().out)
    again, _, _ = train.parse(["--config", str(tmp_path / "settings.yaml")])
    config, _, _ = train.parse(options)
    assert asdict(again) == asdict(config)
    assert yaml.safe_load((tmp_path / "settings.yaml").read_text())["optim"]["epochs"] == 2


@pytest.mark.parametrize("name", [*RENAMED, *NOW_VARIANT])
def test_an_old_name_is_one_line_that_says_the_new_one(options, tmp_path, capsys, name):
    section, _, key = name.rpartition(".")
    new = RENAMED.get(name, "--loss.variant ")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({section: {key: 2}} if section else {key: 2}))
    for arguments in ([f"--{name}", "2"], [f"--{name}=2"], ["--config", str(recipe)]):
        status, _, err = run([*options, *arguments], capsys)
        assert status == 2
        assert f"{name} is now {new}" in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "variant", "arguments"),
    [
        ({"model": {"shuffle_memory": True}}, "shuffled_memory", {}),
        ({"model": {"revision": "none", "local_gradient": True}}, "memory_not_used", {}),
        ({"model": {"local_gradient": False}, "loss": {"classification": "focal"}}, "cge_focal_detached_weights", {}),
        ({"model": {"cge": False}, "loss": {"classification": "sphere"}}, "sphere", {}),
        ({"model": {"cge": False, "logit_scale": 0.7}}, "scaled", {"scale": 0.7}),
        ({"model": {"logit_scale": 0.7, "alpha": "constant"}, "loss": {"l2": 0.5}}, "cge_scaled", {"scale": 0.7}),
        ({"model": {"revision": "logits", "logit_scale": 1.0}, "kernels": "one_pass"}, "", {}),
    ],
)
def test_settings_of_the_first_edition_name_the_variant_that_they_were(tmp_path, old, variant, arguments):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    config = read_settings(tmp_path / "config.yaml")
    assert (config.loss.variant, config.loss.variant_args) == (variant, arguments)
    assert config.model.memory_momentum == old["model"].get("alpha", "linear")
    assert config.loss.metric_weight == old.get("loss", {}).get("l2", 1)
    assert config.backend == "auto"

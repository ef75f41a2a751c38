"""Settings of the training program: wrong ones, files of them, and the names that options once had."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from runs import run
from support import GPU

from cge_fast import train
from cge_fast.build import check_cuda_graph
from cge_fast.cli import NOW_VARIANT, NULLABLE, RENAMED, read_settings, to_yaml
from cge_fast.errors import UserError
from cge_fast.options import TrainConfig
from cge_fast.wanted import TYPES, wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--optim.epochs", "many"], "optim.epochs: must be a whole number above 0, at most 1000000, got many"),
        (["--optim.epochs", "0"], "optim.epochs: must be "),
        (["--data.erasing", "1.5"], "data.erasing: must be a number at least 0, at most 1, got 1.5"),
        (["--data.workers=-1"], "data.workers: must be a whole number at least 0, at most 512, got -1"),
        (["--evaluation.batch", "0"], "evaluation.batch: must be "),
        (["--optim.epoch", "3"], "there is no --optim.epoch, did you mean --optim.epochs?"),
        (["--erasing", "0"], "there is no --erasing, did you mean --data.erasing?"),
        (["--optim.milestones", "3,x"], "optim.milestones: must be a list like 10,20, each a number above 0"),
        (["--loss.margin", "hard"], "loss.margin: must be a number at least 0, at most 1000000, or soft, got hard"),
        (["--data.root", "/nowhere"], "data.root: there is no folder /nowhere/bounding_box_train"),
        (["--data.name", "folder"], "market/train"),
        (["--data.identities", "5"], "data.identities: a batch needs 5, the training split has 4"),
        (["--model.stripes", "4"], "model.stripes: 4 do not fit the feature map, which has 3 rows"),
        (["--optim.accumulate", "4"], "loss.metric_weight: the metric loss needs 2 identities in a micro-batch"),
        (["--seed", str(2**63)], "seed: must be "),
        (["--output", "/dev/null/run"], "output: /dev/null/run cannot be made (Not a directory)"),
        (["--optim.accumulate", "3"], "optim.accumulate: 4 identities cannot be cut evenly into 3"),
        pytest.param(
            *(["--optim.precision", "float16"], "optim.precision: float16 needs a GPU"),
            marks=pytest.mark.skipif(GPU, reason="has a GPU"),
        ),
        (["--model.pretrained", "true"], "model.pretrained: the backbone compact has no ImageNet weights"),
        (["--resume"], "has no file model.safetensors"),
        (
            ["--config", "no_such_recipe"],
            "no_such_recipe is neither a file nor a recipe; the recipes are agw_fastreid, ",
        ),
        (["--backend", "fast"], "backend: must be one of auto, triton, cpu, reference, got fast"),
        (["--loss.variant", "focal"], "loss.variant: must be empty; python -m cge_fast.experiments.variants has some"),
        (["--model.cge", "false", "--model.revision", "features"], "model.revision is now --loss.variant cge_feature"),
        (["--loss.classification", "sphere"], "loss.classification is now --loss.metric sphere, which adds SphereFace"),
        (["--model.cge", "false", "--model.shard_classes", "true"], "shard_classes needs cge and the loss CGELoss"),
        (["--data.name", "pedestrians"], "is not read, pedestrians is drawn; give data.name too"),
        (["--optim.lr", "inf"], "optim.lr: must be a number above 0, at most 1000000, got inf"),
        (["--optim.epochs", "1000000000000"], "optim.epochs: must be "),
        (["--data.workers", "1e30"], "data.workers: must be "),
        (["--loss.variant_args", "{scale: .nan}"], "loss.variant_args: must be "),
        (["--model.cge", "null"], "model.cge: must be true or false, got null"),
        (["--optim", "/etc/passwd"], "optim: give settings one by one, like --optim.lr 1e-3"),
        (["--model.class_path=os.system"], "model.class_path: give settings one by one"),
        (["--data.root="], "data.root: must be a path, got nothing"),
        (["--output", ""], "output: must be a path, got nothing"),
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


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CGE_BACKEND", "cuda", "CGE_BACKEND must be one of auto, triton, cpu, reference, got 'cuda'"),
        ("CGE_SCRATCH_MB", "1e3", "CGE_SCRATCH_MB must be a whole number of mebibytes, got '1e3'"),
        ("CGE_SCRATCH_MB", "9" * 40, f"CGE_SCRATCH_MB must be a whole number of mebibytes, got '{'9' * 40}'"),
    ],
)
def test_a_wrong_variable_is_one_line_and_leaves_nothing_behind(
    variable, value, message, options, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv(variable, value)
    status, _, err = run(options, capsys)
    assert status == 2
    assert err == f"cge_fast.train: error: {message}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"optim: 5\n", "settings.yaml: optim must be a section of settings, got int"),
        (
            b"seed: 1\noptim:\n  epoch: 3\n",
            "settings.yaml, line 3: there is no optim.epoch, did you mean optim.epochs?",
        ),
        (b"sed: 1\n", "settings.yaml, line 1: there is no sed, did you mean seed?"),
        (b"optim:\n  epochs: 3\n lr: 1\n", "settings.yaml, line 3: cannot be read as YAML"),
        (b"optim: {epochs: three}\n", "settings.yaml, line 1: optim.epochs: must be a whole number above 0"),
        (b"optim: [\n", "config"),
        (b"\xff\xfe\x00", "config"),
        (b"model: {cge:}\n", "model.cge must have a value, got null"),
        (b"data: /etc/passwd\n", "data must be a section of settings, got str"),
        (b"optim: {epochs: 2}\nseed: 1\noptim: {lr: 1}\n", "line 3: optim is there more than once"),
        (b"seed: &a [*a]\n", "line 1: aliases are not allowed"),
        (b"seed: " + 500 * b"[" + 500 * b"]", "more than 8 levels"),
        (b"#" * 200_000, "more than 100000 bytes"),
        (b"optim: {lr: .inf}\n", "optim.lr: must be "),
        (b"seed: " + 5000 * b"9", "config"),
        (b"optim: {milestones: [" + 5000 * b"0.5, " + b"1]}", "or 500 keys and values"),
        (b"optim.lr: 1\noptim: {lr: 2}\n", "optim.lr is there more than once"),
        (b"config: /etc/passwd\n", "must hold settings, not the name of another file of them (config)"),
        (b"data: {root: ''}\n", "data.root must have a value, got nothing"),
    ],
)
def test_a_wrong_settings_file_is_one_line(options, tmp_path, capsys, content, message):
    (tmp_path / "settings.yaml").write_bytes(content)
    status, _, err = run([*options, "--config", str(tmp_path / "settings.yaml")], capsys)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "settings", ["model: {SECRET}", "{SECRET}", "data: {root: {SECRET}}", "loss: {variant_args: {SECRET}}"]
)
def test_settings_are_data_and_import_nothing(options, trained, tmp_path, capsys, monkeypatch, settings):
    (tmp_path / "imported_by_settings.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    text = settings.replace("SECRET", "class_path: imported_by_settings.X")
    recipe, config = tmp_path / "recipe.yaml", trained / "checkpoints" / "last" / "config.yaml"
    recipe.write_text(text)
    config.write_text(text)
    for arguments in ([*options, "--config", str(recipe)], ["--output", str(trained), "--resume"]):
        status, _, err = run(arguments, capsys)
        assert status == 2
        assert "settings are data, no class_path is imported" in err


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves it in --option=~/x, and so does YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("data: {root: ~/people, name: folder}\nmodel: {weights: ~nobody.here/w}\n")
    config, _, _ = train.parse(["--output=~/run", "--config", str(tmp_path / "settings.yaml")])
    assert config.output == tmp_path / "run"
    assert config.data.root == tmp_path / "people"
    assert str(config.model.weights) == "~nobody.here/w"


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        ("folder", "A+B", "HERE/A+B"),
        ("folder+market", "A+~/B", "HERE/A+HOME/B"),
        ("pedestrians+market", "+B", "+HERE/B"),
    ],
)
def test_every_folder_of_several_sets_is_found_from_elsewhere_too(tmp_path, monkeypatch, name, root, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    config, _, _ = train.parse(["--data.name", name, "--data.root", root])
    assert str(config.data.root) == expected.replace("HERE", str(Path.cwd())).replace("HOME", str(tmp_path))


def test_every_setting_but_three_must_have_a_value(tmp_path):
    values = yaml.safe_load(to_yaml(train.parse(["--output", "run"])[0]))
    sections = {section: held for section, held in values.items() if isinstance(held, dict)}
    for section, name in ((section, name) for section, held in sections.items() for name in held):
        changed = values | {section: values[section] | {name: None}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
        if f"{section}.{name}" in NULLABLE:
            read_settings(tmp_path / "config.yaml")
        else:
            with pytest.raises(UserError, match=rf"{section}\.{name} must have a value, got null"):
                read_settings(tmp_path / "config.yaml")


def test_names_of_several_sets_are_text_in_the_settings_file(tmp_path):
    config, _, _ = train.parse(["--data.name", "folder+market", "--output", "run"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_settings(tmp_path / "config.yaml").data.name == "folder+market"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_numbers_and_line_ends_of_editors_are_understood(tmp_path, mark, end):
    text = f"{mark}optim: {{lr: 3e-4, weight_decay: 5E-4}}{end}seed: 1{end}"
    (tmp_path / "settings.yaml").write_bytes(text.encode())
    config, _, _ = train.parse(["--config", str(tmp_path / "settings.yaml")])
    assert (config.optim.lr, config.optim.weight_decay, config.seed) == (3e-4, 5e-4, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "many"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "2"), ("RANK", "-1"), ("LOCAL_RANK", "1.5")],
)
def test_environment_variables_that_torchrun_would_not_set_are_named(
    options, tmp_path, capsys, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("os._exit", sys.exit)
    status, _, err = run(options, capsys)
    assert status == 2
    assert err.startswith(f"cge_fast.train: error: {name}: ")
    assert not (tmp_path / "run").exists()


def test_help_shows_the_defaults_of_the_files_that_config_names(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.125}")
    shown = help_of(["--config", "cge_bot", f"--config={tmp_path / 'mine.yaml'}"], capsys)
    assert "Image height after resizing, pixels. (default: 384)" in shown
    assert "Learning rate after warm-up. (default: 0.125)" in shown
    assert "(default: 96)" in help_of([], capsys)
    assert "type:" not in shown


def help_of(arguments, capsys) -> str:
    """What --help prints, on one line."""
    with pytest.raises(SystemExit):
        train.main([*arguments, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_of_several_files_and_options_the_last_counts(tmp_path):
    for name, lr in (("one", 0.25), ("other", 0.5)):
        (tmp_path / f"{name}.yaml").write_text(f"optim: {{lr: {lr}}}")
    files = [f"--config={tmp_path / name}.yaml" for name in ("one", "other")]
    config, _, _ = train.parse(["--config", "pedestrians_bot", *files])
    assert (config.model.cge, config.optim.lr) == (False, 0.5)
    assert train.parse([*files, "--optim.lr", "1"])[0].optim.lr == 1
    assert train.parse(["--optim.lr", "1", *files])[0].optim.lr == 0.5


@pytest.mark.parametrize("name", TYPES)
def test_what_a_setting_may_be_is_said_in_words(name):
    said = wanted(TYPES[name])
    assert not any(code in said for code in ("<", "typing", "Bounded", "v>", "|")), said


@pytest.mark.parametrize("given", ["10,20.5", "[10,20.5]", "[10, 20.5]", "10, 20.5"])
def test_a_list_needs_no_brackets(given):
    assert train.parse(["--optim.milestones", given])[0].optim.milestones == [10, 20.5]
    assert train.parse([f"--optim.milestones={given}"])[0].optim.milestones == [10, 20.5]


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

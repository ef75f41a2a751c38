"""The program, on a tiny set."""

import json
import shlex

import pytest

from cge_fast import errors, loop
from cge_fast.experiments import presets
from cge_fast.experiments.__main__ import main
from cge_fast.experiments.presets import Preset, preset_of
from cge_fast.experiments.runs import FINISHED, folder_of, mean_weight, run_rows
from cge_fast.experiments.tables import WITH, comparison
from cge_fast.log import read_rows


@pytest.fixture
def tiny(options, monkeypatch):
    """The tiny training as the small preset of omniglot, whose feature map has three rows."""
    tiny = [*options[: options.index("--output")], "--evaluation.untrained", "false"]
    monkeypatch.setitem(presets.PRESETS["small"], "omniglot", Preset(shlex.join(tiny), rows=3))
    return tiny


def arguments(table, market, tmp_path, *more):
    where = ["--data", "omniglot", "--root", str(market), "--preset", "small", "--output", str(tmp_path / "out")]
    return [table, *where, "--seeds", "1", *more]


@pytest.mark.slow
def test_a_table_is_written_and_its_trainings_are_not_repeated_but_shared(tiny, market, tmp_path, capsys):
    main(arguments("table2", market, tmp_path))
    folder = tmp_path / "out" / "omniglot-small"
    text = (folder / "table2.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| CGE, alpha constant |" in text
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/" + FINISHED)}
    assert len(finished) == 9
    main(arguments("table2", market, tmp_path))
    main(arguments("table1", market, tmp_path))
    again = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/" + FINISHED)}
    assert again.items() >= finished.items()
    assert len(again) == 11, "n = 1 and 2; 3 is there, and the feature map has no fourth row"
    line = next(line for line in (folder / "table1.md").read_text().splitlines() if "n = 4 |" in line)
    assert line == "| CGE, n = 4 |" + " - |" * 7 + " 0 | - |"


@pytest.mark.slow
def test_a_figure_is_drawn_from_the_trainings(tiny, market, tmp_path, capsys):
    main(arguments("figure4", market, tmp_path))
    folder = tmp_path / "out" / "omniglot-small" / "figure4"
    assert (folder / "levels.png").stat().st_size > 1000
    assert (folder / "levels.csv").read_text().count("CGE+BOT") >= 4


@pytest.mark.slow
def test_the_baseline_is_scaled_by_the_mean_weight_of_cge_with_the_same_seed(tiny, tmp_path):
    rows = [row for row in comparison("BOT") if row.scaled_by]
    assert run_rows(tmp_path, rows, 1, tiny, jobs=1) == {}
    source = next(folder for folder in tmp_path.glob("runs/model.cge=true/seed-0"))
    command = json.loads((folder_of(tmp_path, rows[0], 0) / FINISHED).read_text())["arguments"]
    assert command[-2:] == ["--loss.variant_args.scale", f"{mean_weight(source):.4f}"]
    assert 0.5 < mean_weight(source) < 0.74


@pytest.mark.slow
def test_an_interrupted_training_is_continued(tiny, tmp_path, monkeypatch):
    row = comparison("BOT")[3]
    run_rows(tmp_path / "whole", [row], 1, tiny, jobs=1)
    train_epoch = loop.train_epoch

    def interrupted(run, epoch, *arguments):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(run, epoch, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_rows(tmp_path, [row], 1, tiny, jobs=1)
    folder = folder_of(tmp_path, row, 0)
    assert not (folder / FINISHED).exists()
    assert [line["epoch"] for line in read_rows(folder / "metrics.jsonl")] == [1]
    assert run_rows(tmp_path, [row], 1, tiny, jobs=1) == {}
    assert (folder / FINISHED).exists()
    losses, expected = (read_rows(of / "metrics.jsonl") for of in (folder, folder_of(tmp_path / "whole", row, 0)))
    assert [line["loss"] for line in losses] == [line["loss"] for line in expected]


def test_a_training_without_memory_leaves_the_others_and_the_table(tiny, tmp_path, monkeypatch):
    first, *_, last = comparison("BOT")

    def full(run, *arguments):
        if run.config.loss.variant == "shuffled_memory":
            raise RuntimeError("out of memory")
        return train_epoch(run, *arguments)

    train_epoch = loop.train_epoch
    monkeypatch.setattr(loop, "train_epoch", full)
    failures = run_rows(tmp_path, [last, first], 1, tiny, jobs=1)
    assert failures[last.name, 0].startswith("RuntimeError: out of memory, see ")
    assert "Traceback" in (folder_of(tmp_path, last, 0) / "printed.txt").read_text()
    assert (folder_of(tmp_path, first, 0) / FINISHED).exists()


def test_a_figure_names_the_training_that_failed(tiny, market, tmp_path, monkeypatch):
    monkeypatch.setitem(
        presets.PRESETS["small"], "omniglot", Preset(shlex.join([*tiny, "--data.identities", "9"]), rows=3)
    )
    with pytest.raises(errors.UserError, match=r"1 trainings failed, first CGE\+BOT, seed 0: data.identities: a batch"):
        main(arguments("figure6", market, tmp_path))


@pytest.mark.slow
def test_trainings_with_other_settings_are_not_taken_for_these(tiny, market, tmp_path):
    row = comparison("BOT")[0]
    run_rows(tmp_path, [row], 1, tiny, jobs=1)
    with pytest.raises(errors.UserError, match="holds a training with other settings, choose another --output"):
        run_rows(tmp_path, [row], 1, [*tiny, "--optim.epochs", "1"], jobs=1)
    (folder_of(tmp_path, row, 0) / FINISHED).unlink()
    failures = run_rows(tmp_path, [row], 1, [*tiny, "--optim.lr", "0.1"], jobs=1)
    assert "holds a training with other settings" in failures["BOT", 0]


@pytest.mark.slow
def test_a_training_that_fails_is_told_after_the_others_are_done(tiny, tmp_path):
    common = [*tiny, "--optim.epochs", "1"]
    rows = [row for row in comparison("BOT") if row.name in ("BOT", "BOT, logits x mean w", "CGE+BOT")]
    failures = run_rows(tmp_path, rows, 1, [*common, "--model.stripes", "4"], jobs=2)
    assert failures["CGE+BOT", 0].startswith("model.stripes: 4 do not fit the feature map")
    assert failures["BOT, logits x mean w", 0] == "the training that it takes the mean weight of failed"
    assert ("BOT", 0) not in failures


@pytest.mark.slow
def test_rows_start_from_the_presets_first_training(tiny, market, tmp_path, monkeypatch):
    preset = Preset(shlex.join(tiny), rows=3, first=lambda: shlex.join(tiny))
    monkeypatch.setitem(presets.PRESETS["small"], "omniglot", preset)
    main(arguments("figure6", market, tmp_path))
    folder = tmp_path / "out" / "omniglot-small"
    (finished,) = folder.glob("runs/*/*/" + FINISHED)
    command = json.loads(finished.read_text())["arguments"]
    assert command[command.index("--model.weights") + 1] == str(folder / "first/checkpoints/last/model.safetensors")
    assert command[-4:-2] == WITH.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("small", "msmt17", None), "preset: small is for pedestrians and omniglot, not for msmt17"),
        (("paper", "msmt17", None), "root: the data set msmt17 needs the folder where it lies"),
    ],
)
def test_a_preset_that_does_not_fit_is_named(options, message):
    with pytest.raises(errors.UserError, match=message):
        preset_of(*options)


def test_wrong_numbers_are_named():
    with pytest.raises(errors.UserError, match="seeds: must be at least 1, got 0"):
        main(["table1", "--seeds", "0"])

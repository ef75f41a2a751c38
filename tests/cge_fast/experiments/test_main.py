"""The program, on a tiny set."""

import json
import shlex
import subprocess
import sys

import pytest

from cge_fast import errors, loop
from cge_fast.experiments import figures, presets
from cge_fast.experiments.__main__ import PROGRAM, main
from cge_fast.experiments.presets import Preset, place_of
from cge_fast.experiments.runs import FINISHED, folder_of, mean_weight, run_rows
from cge_fast.experiments.tables import comparison
from cge_fast.log import read_rows


@pytest.fixture
def tiny(options, monkeypatch):
    """The tiny training as the small presets, whose feature map has three rows."""
    return as_presets([*options[: options.index("--output")], "--evaluation.untrained", "false"], 3, monkeypatch)


@pytest.fixture
def tall(options, monkeypatch):
    """The same on images whose feature map has twelve rows, one epoch."""
    tiny = [*options[: options.index("--output")], "--evaluation.untrained", "false"]
    return as_presets([*tiny, "--data.height", "96", "--optim.epochs", "1"], 12, monkeypatch)


def as_presets(tiny, rows, monkeypatch):
    for data in ("pedestrians", "omniglot"):
        monkeypatch.setitem(presets.PRESETS["small"], data, Preset(shlex.join(tiny), rows))
    return tiny


def arguments(table, market, tmp_path, *more):
    where = ["--data", "omniglot", "--root", str(market), "--preset", "small", "--output", str(tmp_path / "out")]
    return [table, *where, "--seeds", "1", *more]


@pytest.mark.slow
def test_every_table_and_figure_is_measured_and_drawn(tall, market, tmp_path, capsys):
    names = [f"table{number}" for number in range(1, 10)] + [f"figure{number}" for number in (4, 5, 6, 7)]
    out, into = tmp_path / "out", tmp_path / "results.md"
    into.write_text("<!-- measured --><!-- end of measured -->")
    more = ["--data", "omniglot", "--root", str(market), "--preset", "small", "--seeds", "1", "--output", str(out)]
    main([*names, *more, "--into", str(into)])
    printed, text = capsys.readouterr().out, into.read_text()
    for name in (name for name in names if name != "table8"):
        written = (out / "omniglot-small" / f"{name}.md").read_text()
        assert written in printed
        assert written in text
        empty = [line for line in written.splitlines() if line.endswith("| - | - |")]
        assert len(empty) == (10 if name == "table9" else 0), "but for what the paper lists of others"
    assert "## table8: What differs between two AGWs" in text
    assert {path.parent.name: path.name for path in out.glob("**/*.png")} == {
        "figure4": "levels.png",
        "figure5a": "loss_cdf.png",
        "figure5b": "over_stripes.png",
        "figure6": "over_epochs.png",
        "figure7": "saliency.png",
    }
    finished = {path: path.stat().st_mtime_ns for path in out.glob("**/" + FINISHED)}
    main([*names, *more])
    assert {path: path.stat().st_mtime_ns for path in out.glob("**/" + FINISHED)} == finished, "none is repeated"


@pytest.mark.slow
def test_figure_4_has_a_pie_for_each_set(tiny, market, tmp_path, capsys):
    sets = ["--data", "pedestrians", "omniglot", "--root", str(market), "--preset", "small"]
    main(["figure4", *sets, "--output", str(tmp_path)])
    assert (tmp_path / "figure4" / "levels.png").stat().st_size > 1000
    levels = (tmp_path / "figure4" / "levels.csv").read_text()
    assert levels.count("pedestrians,") == levels.count("omniglot,") == 4
    assert "the paper: easiest 82.1% on Market-1501" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_of_a_table_works_alone_and_rows_that_do_not_fit_stay_empty(tiny, market, tmp_path):
    main(arguments("table1b", market, tmp_path))
    folder = tmp_path / "out" / "omniglot-small"
    text = (folder / "table1b.md").read_text()
    assert "Controls" not in text
    assert len([*folder.glob("runs/*/*/" + FINISHED)]) == 1, "n = 3; the feature map has not 6 rows"
    first, *others = [line for line in text.splitlines() if line.startswith("| CGE+UPT-BOT")]
    precision = first.split(" | ")[2]
    assert [0 <= float(share) <= 100 for share in precision.split()] == [True] * 3
    assert [line.count(" - ") for line in others] == [5, 5]


def test_table_8_trains_nothing(tmp_path, capsys):
    main(["table8", "--preset", "small", "--output", str(tmp_path / "out")])
    assert "| image | 256x128 | 384x128 |" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_baseline_is_scaled_by_the_mean_weight_of_cge_with_the_same_seed(tiny, tmp_path):
    rows = [row for row in comparison("BOT") if row.scaled_by or row.name == "CGE+BOT"][::-1]
    assert run_rows(tmp_path, rows, 1, tiny, jobs=1) == {}
    source = next(folder for folder in tmp_path.glob("runs/model.cge=true/seed-0"))
    command = json.loads((folder_of(tmp_path, rows[0], 0) / FINISHED).read_text())["arguments"]
    assert command[-2:] == ["--loss.variant_args.scale", f"{mean_weight(source):.4f}"]
    assert 0.5 < mean_weight(source) < 0.74


@pytest.mark.slow
def test_an_interrupted_training_is_continued(tiny, tmp_path, monkeypatch):
    row = comparison("BOT")[1]
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
    with pytest.raises(errors.UserError, match=r"1 trainings failed, first CGE\+UPT-BOT, seed 0: data.identities: a"):
        main(arguments("figure4", market, tmp_path))


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
    main(arguments("figure4", market, tmp_path))
    folder = tmp_path / "out" / "omniglot-small"
    (finished,) = folder.glob("runs/*/*/" + FINISHED)
    command = json.loads(finished.read_text())["arguments"]
    assert command[command.index("--model.weights") + 1] == str(folder / "first/checkpoints/last/model.safetensors")
    assert command[-4:-2] == ["--model.cge", "true"]


@pytest.mark.slow
def test_a_figure_leaves_out_sets_whose_maps_have_too_few_rows(tiny, market, tmp_path, monkeypatch, capsys):
    with pytest.raises(errors.UserError, match=r"^figure6: needs feature maps of more rows, omniglot's have 3$"):
        main(arguments("figure6", market, tmp_path))
    monkeypatch.setitem(presets.PRESETS["small"], "pedestrians", Preset(shlex.join(tiny), rows=12))
    figures.require_fit("figure6", [place_of("small", data, market, tmp_path) for data in ("pedestrians", "omniglot")])
    assert "figure6: left out where feature maps have too few rows, omniglot's have 3" in capsys.readouterr().err


PROGRESS_IN_PROCESSES = """
from cge_fast.data import ReidSet
from cge_fast.data.images import without_corrupt
from cge_fast.experiments.runs import executor

if __name__ == "__main__":
    with executor(2) as map_unordered:
        print(list(map_unordered(without_corrupt, [ReidSet([], [], [])])))
"""


@pytest.mark.slow
def test_processes_that_show_progress_leave_nothing_behind(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRESS_IN_PROCESSES)
    printed = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=100, check=True)
    assert printed.stdout == "[(ReidSet(train=[], query=[], gallery=[]), [])]\n"
    assert "leaked" not in printed.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--preset", "small", "--data", "msmt17", "--root", "x"],
            "preset: small is for pedestrians and omniglot, not fo",
        ),
        (["--data", "msmt17"], "root: give a folder for each of msmt17, got 0"),
        (["--data", "pedestrians", "msmt17", "veri776", "--root", "x"], "a folder for each of msmt17, veri776, got 1"),
        (["--root", "x"], "root: give a folder for each of no set, got 1"),
        (["--seeds", "0"], "seeds"),
        (["--sed", "1"], "error: there is no --sed, did you mean --seeds?\n"),
        (["--jobs", "0"], "jobs"),
        (["table10"], "table10"),
    ],
)
def test_wrong_calls_are_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: main(["table1", *options]), PROGRAM)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err

"""The table of controls."""

import json

import pytest

from cge_fast import errors, experiments, train
from cge_fast.experiments import CONTROLS, main, run_folder


def fake_run(output, row, seed, mean_ap):
    folder = run_folder(output, row, seed)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "mAP": mean_ap, "rank1": 2 * mean_ap}) + "\n")


def test_differences_are_paired_by_seed(tmp_path):
    for number, row in enumerate(CONTROLS):
        for seed in (0, 1, 2):
            fake_run(tmp_path, row, seed, 0.3 + 0.1 * seed + 0.01 * number)
    lines = experiments.table(tmp_path, 3, "the command").splitlines()
    assert lines[0] == "| row | mAP % | rank-1 % | mAP less BOT | mAP less BOT, logits x 0.71 |"
    assert lines[2] == "| BOT | 40.0 ± 10.0 | 80.0 ± 20.0 |  | -1.0 ± 0.0 |"
    assert lines[5] == "| CGE | 43.0 ± 10.0 | 86.0 ± 20.0 | +3.0 ± 0.0 | +2.0 ± 0.0 |"
    assert "    the command" in lines


def test_rows_are_trained_once_and_their_table_is_written(options, tmp_path, capsys):
    training = [*options[: options.index("--output")], "--optim.epochs", "1"]
    arguments = ["controls", "--output", str(tmp_path / "table"), "--seeds", "1", "--jobs", "2", "--", *training]
    main(arguments)
    assert "| CGE, detached weights |" in (tmp_path / "table" / "table.md").read_text()
    weights = run_folder(tmp_path / "table", "CGE", 0) / "checkpoints" / "last" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    first = (tmp_path / "table" / "table.md").read_text()
    main(arguments)
    assert (tmp_path / "table" / "table.md").read_text() == first
    assert weights.stat().st_mtime_ns == written


def test_a_run_with_other_settings_is_not_taken_for_this_one(options, tmp_path):
    train.main([*options, "--model.cge", "false", "--output", str(run_folder(tmp_path, "BOT", 0))])
    other = [*options[: options.index("--output")], "--optim.epochs", "3"]
    with pytest.raises(errors.UserError, match=r"BOT, seed 0: .* holds a run with other settings"):
        main(["controls", "--output", str(tmp_path), "--seeds", "1", "--", *other])


def test_a_training_that_fails_is_named(tmp_path):
    with pytest.raises(errors.UserError, match=r"BOT, seed 0: .*data.root: the data set market1501 needs the folder"):
        main(["controls", "--output", str(tmp_path), "--seeds", "1", "--", "--data.name", "market1501"])

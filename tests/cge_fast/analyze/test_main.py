"""python -m cge_fast.analyze"""

import PIL.Image
import pytest

from cge_fast import errors
from cge_fast.analyze.__main__ import PROGRAM, main
from cge_fast.api import load


@pytest.mark.slow
@pytest.mark.parametrize("name", ["levels", "precision", "loss-cdf", "saliency", "weights", "ranked"])
def test_every_analysis_writes_a_picture_and_a_table_and_says_where(saved, tmp_path, capsys, rows_of, name):
    main([name, "--checkpoint", str(saved("mine")), "--output", str(tmp_path / "new" / "out")])
    summary, files = capsys.readouterr().out.splitlines()
    assert "mine" in summary or name == "ranked"
    picture, table = files.split(" and ")
    assert picture == str(tmp_path / "new" / "out" / f"{name.replace('-', '_')}.png")
    with PIL.Image.open(picture) as image:
        assert min(image.size) > 200
    assert rows_of(tmp_path / "new" / "out" / table)


@pytest.mark.slow
def test_each_checkpoint_is_looked_at_with_its_own_settings_but_for_those_given(saved, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("cge_fast.analyze.trained.load", spy(seen))
    small, large = saved("small"), saved("large", "--data.height", "48", "--evaluation.batch", "5")
    arguments = ["saliency", "--checkpoint", str(small), str(large), "--output", str(tmp_path), "--labels", "a", "b"]
    main(arguments)
    main([*arguments, "--evaluation.batch", "2", "--images", "1"])
    assert [(data.height, evaluation.batch) for data, evaluation in seen] == [(24, 7), (48, 5), (24, 2), (48, 2)]


def spy(seen):
    def remember(folder, device, data, evaluation, variants):
        seen.append((data, evaluation))
        return load(folder, device, data, evaluation, variants)

    return remember


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand"),
        (["pies"], "pies"),
        (["levels"], "checkpoint"),
        (["levels", "--checkpoint", "/nix"], "checkpoint /nix has no file model.safetensors"),
        (["loss-cdf", "--checkpoint", "LAST", "--data.root", "/nix"], "data.root: there is no folder /nix"),
        (["levels", "--checkpoint", "LAST", "LAST"], "labels: 2 checkpoints are called bot"),
        (["levels", "--checkpoint", "LAST", "--labels", "a", "b"], "labels: 2 for 1 checkpoints, give one for each"),
        (["levels", "--checkpoint", "LAST"], "levels needs CGE"),
        (["levels", "--checkpoint", "LAST", "--queries", "3"], "--queries"),
        (["ranked", "--checkpoint", "LAST", "LAST"], "LAST"),
        (["ranked", "--checkpoint", "LAST", "--queries", "0"], "queries"),
        (["ranked", "--checkpoint", "LAST", "--output", "/dev/null/x"], "/dev/null/x: Not a directory"),
    ],
)
def test_wrong_calls_are_one_line(saved, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    last = str(saved("bot", "--model.cge", "false"))
    arguments = [last if argument == "LAST" else argument for argument in arguments]
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: main(arguments), PROGRAM)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message.replace("LAST", last) in error
    assert len([line for line in error.splitlines() if "error" in line]) == 1

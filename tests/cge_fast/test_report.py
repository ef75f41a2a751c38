"""The page about a run."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from browser import assert_well_formed, needs_chromium
from runs import refused, run

import cge_fast
from cge_fast import compare, errors, report
from cge_fast.options import LossConfig, TrainConfig
from cge_fast.report import REPORT, read_run, series_of, settings


def test_a_training_ends_with_the_page(shared_run):
    page = (shared_run / REPORT).read_text()
    headings = ["Training", "Ranked lists", "Where the network looks", "Settings", "Environment"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    for text in ("Retrieval", "Images by stripes that are right", "AP <b>100.0%</b>", "2/2", "data.height", "Python"):
        assert text in page


def test_the_page_fetches_nothing_and_runs_nothing(shared_run):
    page = (shared_run / REPORT).read_text()
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    for outside in ("http", "@import", "url(", "<script", '<link rel="stylesheet'):
        assert outside not in page


@pytest.fixture
def odd_run(shared_run, tmp_path):
    """A run with a long name, a long setting, many epochs and many stripes."""
    odd = tmp_path / ("<i>" + "long_name_" * 20)
    shutil.copytree(shared_run, odd)
    row = json.loads((odd / "metrics.jsonl").read_text().splitlines()[-1])
    row |= {"stripe_precision": [0.5] * 16, "num_stripes_correct": [1 / 17] * 17, "loss": 123456.789, "lr": 3.5e-11}
    rows = [row | {"epoch": epoch} for epoch in range(1, 1001)]
    (odd / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = odd / "config.yaml"
    config.write_text(config.read_text().replace("weights: null", f"weights: {'long/' * 40}x.pth"))
    report.write(odd)
    return odd


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared_run", "odd_run"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_all_of_it_at_any_width(request, name, tmp_path, width):
    assert_well_formed(request.getfixturevalue(name) / REPORT, tmp_path / "seen", width)


def test_the_program_writes_the_page_of_a_run_that_has_none(trained, capsys):
    (trained / REPORT).unlink()
    report.main([str(trained)])
    assert capsys.readouterr().out == f"{trained / REPORT}\n"
    assert "Ranked lists" in (trained / REPORT).read_text()


def test_without_the_images_the_page_has_no_pictures_and_a_line_says_why(trained, market, capsys):
    shutil.rmtree(market)
    report.main([str(trained)])
    assert f"{REPORT} is without pictures: data.root: there is no folder {market}" in capsys.readouterr().err
    page = (trained / REPORT).read_text()
    assert "Ranked lists" not in page
    assert "Retrieval" in page


def test_without_matplotlib_a_line_names_the_extra(trained, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "cge_fast.analyze.embedded", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main([str(trained)])
    why = "report.html is without pictures: they need matplotlib: pip install 'cge-fast[analyze]'\n"
    assert capsys.readouterr().err == why


def test_ctrl_c_leaves_a_page_about_what_was_trained(options, tmp_path, capsys, monkeypatch):
    from cge_fast import loop

    def interrupted(run, epoch, *others, train_epoch=loop.train_epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(run, epoch, *others)

    monkeypatch.setattr("cge_fast.loop.train_epoch", interrupted)
    status, _, _ = run(options, capsys)
    page = (tmp_path / "run" / REPORT).read_text()
    assert status == 130
    assert "1/2" in page
    assert "Ranked lists" not in page


def test_its_pictures_are_of_the_average_that_is_deployed(options, tmp_path, capsys, monkeypatch):
    looked_at = []
    monkeypatch.setattr("cge_fast.report.pictures_of", lambda opened: looked_at.append(opened().model) or {})
    status, _, _ = run([*options, "--optim.ema", "0.5"], capsys)
    assert status == 0
    deployed = cge_fast.load(tmp_path / "run").model.state_dict()
    for name, tensor in looked_at[0].state_dict().items():
        assert torch.equal(tensor.cpu(), deployed[name].cpu()), name


def test_an_end_before_the_first_figure_leaves_no_page(options, tmp_path, capsys, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("cge_fast.loop.evaluation", interrupted)
    status, _, _ = run(options, capsys)
    assert status == 130
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / REPORT).exists()


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_said_and_the_training_ends_well(options, tmp_path, capsys):
    (tmp_path / "run" / REPORT).mkdir(parents=True)
    status, out, err = run(options, capsys)
    assert status == 0
    assert out.startswith("mAP ")
    assert f"{REPORT} is not written: " in err


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "is not the folder of a run, it has no config.yaml"), ({"config.yaml": "{}"}, "has no figures in")],
)
def test_a_folder_without_a_run_or_figures_is_one_line(tmp_path, capsys, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: report.main([str(tmp_path)]), "cge_fast.report")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_may_end_like_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mydata", "myoutput"):
        with pytest.raises(errors.UserError, match=f"run: {name} is not the folder of a run"):
            report.main([name])


def test_names_cannot_be_markup(trained, tmp_path):
    odd = trained.rename(tmp_path / "<b>&run")
    page = report.write(odd).read_text()
    assert "<h1>&lt;b&gt;&amp;run</h1>" in page


def test_a_run_of_an_earlier_version_has_no_environment(trained):
    (trained / report.ENVIRONMENT).unlink()
    assert read_run(trained).environment == {}
    assert "<h2>Environment" not in report.write(trained).read_text()


@pytest.mark.parametrize("content", [b"", b'{"device": "CP', b"[1, 2]", b"\xff\x00"])
def test_a_damaged_environment_is_left_out_with_one_line(trained, capsys, content):
    (trained / report.ENVIRONMENT).write_bytes(content)
    report.main([str(trained)])
    assert "<h2>Environment" not in (trained / REPORT).read_text()
    said = capsys.readouterr().err
    assert said.startswith(f"left out: {trained / report.ENVIRONMENT} is damaged: it must hold a JSON object")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("config.yaml", b"", "config.yaml must hold settings"),
        ("config.yaml", b"optim: {lr", "config.yaml, line 1"),
        ("config.yaml", b"\xff\x00", "config.yaml cannot be read"),
        ("metrics.jsonl", b'{"epoch": 1, "loss": "x"}\n', "metrics.jsonl, line 1"),
        ("metrics.jsonl", b'{"epoch": 1, "stripe_precision": [0.5, null]}\n', "metrics.jsonl, line 1"),
        ("metrics.jsonl", bytes(100) + b"\n", "metrics.jsonl, line 1"),
    ],
)
def test_other_damaged_files_are_one_line(trained, capsys, name, content, where):
    (trained / name).write_bytes(content)
    for main in (report.main, compare.main):
        assert where in refused(main, "cge_fast.report", [str(trained)], capsys)


def test_figures_that_rows_lack_are_left_out(trained):
    lists = {"stripe_precision": [0.5, 0.25], "mAP": 0.5, "rank1": None}, {"stripe_precision": [0.5]}
    lines = ({"epoch": 0, "mAP": 0.5}, *({"epoch": epoch} | row for epoch, row in enumerate(lists, start=1)))
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"epoch": 3, "mA')
    page = report.write(trained).read_text()
    assert "2/2" in page
    assert "50.0%" in page
    assert "untrained: mAP" not in page
    compare.html({"one": read_run(trained)})


def test_the_environment_is_of_the_training_not_of_the_report(trained):
    (trained / report.ENVIRONMENT).write_text(json.dumps({"device": "another GPU"}))
    assert "another GPU" in report.write(trained).read_text()


def test_series_have_the_epochs_that_have_values():
    rows = [{"epoch": 0, "a": None}, {"epoch": 1, "a": 0.5, "b": [1, 0], "c": 0}, {"epoch": 2, "b": [0.5, 0], "c": 0}]
    assert series_of(rows, "x", "a") == [("x", [(1, 0.5)])]
    assert series_of(rows, "x", "b") == [("x 1", [(1, 1), (2, 0.5)]), ("x 2", [(1, 0), (2, 0)])]
    assert series_of(rows, "x", "c") == series_of(rows, "x", "d") == []


def test_settings_are_as_a_file_has_them():
    of = settings(TrainConfig())
    assert (of["model.cge"], of["data.root"], of["optim.milestones"]) == ("true", "null", "0.6, 0.85")
    assert (of["backend"], of["optim.lr"]) == ("auto", "0.002")
    assert "output" not in of
    assert "data" not in of
    variant = replace(TrainConfig(), loss=LossConfig(variant="scaled", variant_args={"scale": 0.7}))
    assert settings(variant)["loss.variant_args"] == '{"scale": 0.7}'


def test_a_run_that_has_its_first_evaluation_alone_has_a_page(trained):
    file = trained / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    page = report.write(trained).read_text()
    assert "untrained: mAP 100.0%" in page
    assert "0/2" in page

"""What README and docs name is there, and they name all that must be. Their commands: test_commands.py."""

import re

import PIL.Image
import pytest
import torch
import yaml
from pages import PAGES, ROOT, python_of

import cge_fast
from bench.results import by_table, read, table


def test_the_loop_has_under_25_lines():
    (loop,) = python_of((ROOT / "README.md").read_text())
    assert len(loop.splitlines()) < 25


@pytest.fixture
def runs_mine(shared_run, tmp_path, monkeypatch):
    """The folder that the pages' commands are called in: a run, and two images."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(shared_run)
    for name in ("a.jpg", "b.jpg"):
        PIL.Image.effect_mandelbrot((45, 90), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_images_are_embedded_as_the_page_says(runs_mine):
    (block,) = examples("docs/evaluation.md")
    scope = {}
    exec(block, scope)
    assert scope["features"].shape == (2, 128)


@pytest.mark.slow
def test_an_exported_network_is_given_images_as_the_page_says(runs_mine):
    pytest.importorskip("onnxruntime")
    from cge_fast import export

    export.main(["--checkpoint", "runs/mine", "--output", "model.onnx"])
    (block,) = examples("docs/export.md")
    scope = {}
    exec(block, scope)
    features = cge_fast.load("runs/mine", "cpu").embed(["a.jpg"])
    torch.testing.assert_close(torch.from_numpy(scope["embeddings"]), features, rtol=1e-3, atol=1e-3)


def test_every_recipe_is_named():
    from cge_fast.cli import recipes

    page = (ROOT / "docs/training.md").read_text()
    for name in recipes():
        assert f"`{name}`" in page


def test_every_data_set_is_named():
    from typing import get_args

    from cge_fast.options import DataSet

    page = (ROOT / "docs/datasets.md").read_text()
    for name in get_args(DataSet):
        assert f"`{name}`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("https://")]
    for target in targets:
        assert (page.parent / target).exists(), target


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == newest[1] == cge_fast.__version__


def test_measured_tables_are_those_of_the_results_file():
    figures = by_table(read(ROOT / "bench/results.csv"))
    quoted = re.findall(r"<!-- bench/results.csv: (.+) -->\n((?:\|.*\n)+)", "".join(page.read_text() for page in PAGES))
    assert quoted
    for name, found in quoted:  # `python -m bench tables` prints them
        assert found.strip() == table(figures[name]), name

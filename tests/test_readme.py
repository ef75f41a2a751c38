"""What README and docs name is there, and they name all that must be. Their commands: test_commands.py."""

import re

import pytest
import yaml
from pages import PAGES, ROOT, python_of

import cge_fast
from bench.results import by_table, read, table


def test_the_loop_has_under_25_lines():
    (loop,) = python_of((ROOT / "README.md").read_text())
    assert len(loop.splitlines()) < 25


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

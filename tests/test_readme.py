"""What README and docs show must run, and what they point at must exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import cge_fast
from bench.results import by_table, read, table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(page: str) -> list[str]:
    """The page's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_loop_has_under_25_lines_and_runs():
    (loop,) = examples("README.md")
    assert len(loop.splitlines()) < 25
    scope = {}
    exec(loop, scope)
    assert scope["embedding"].shape == (16, 512)
    assert scope["head"].loss.memory.norm(dim=2).sum() > 0


def test_the_kernels_run_on_a_chosen_backend():
    (block,) = examples("docs/kernels.md")
    scope = {}
    exec(block, scope)
    assert scope["revised"].shape == (8, 10)
    assert scope["stripes"].shape == (8, 3, 64)


def test_a_checkpoint_is_analysed_as_the_page_says(shared_run, tmp_path, monkeypatch, capsys):
    (block,) = examples("docs/analysis.md")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(shared_run)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert capsys.readouterr().out.startswith("mine: easiest ")
    assert (tmp_path / "analyses" / "levels.png").exists()


def test_every_recipe_is_named():
    from cge_fast.cli import recipes

    page = (ROOT / "docs/training.md").read_text()
    for name in recipes():
        assert f"`{name}`" in page


def test_every_data_set_is_named():
    from cge_fast.options import SETS

    page = (ROOT / "docs/datasets.md").read_text()
    for name in SETS.split():
        assert f"`{name}`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("https://")]
    for target in targets:
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_of_modules_that_exist(page):
    modules = set(re.findall(r"-m ((?:bench|cge_fast|cge_kernels)[\w.]*)", page.read_text()))
    for module in modules:
        places = [ROOT / folder / module.rstrip(".").replace(".", "/") for folder in ("", "kernels")]
        assert any(place.with_suffix(".py").exists() or (place / "__main__.py").exists() for place in places), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_are_the_programs(page):
    from cge_fast.cli import program_parser
    from cge_fast.options import TrainConfig

    parser = program_parser("", "")
    parser.add_class_arguments(TrainConfig)
    known = set(parser.get_defaults().keys(branches=True))
    for option in re.findall(r"--((?:data|model|loss|optim|evaluation)\.\w+)", page.read_text()):
        assert option in known, option


def test_options_of_measurements_are_the_programs():
    for page in PAGES:
        for command, rest in re.findall(r"-m bench ([a-z]\w*)([^`\n]*(?:\n(?! )[^`\n]+)*)", page.read_text()):
            if command == "tables":
                continue  # part of the program itself
            parser = ArgumentParser()
            import_module(f"bench.{command}").add_options(parser)
            known = {"csv", *parser.get_defaults().keys()}
            told = re.findall(r"--(\w+)", rest)
            assert set(told) <= known, f"{page.name}: {command} {told}"


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

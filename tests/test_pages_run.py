"""The Python of README and docs runs, and so do the commands that train and that use a trained network.

Trainings are cut short: a tiny set and network, two epochs of three steps, unless the command says otherwise. What
torchrun would start runs as one process.
"""

import re
import shutil
from itertools import pairwise

import pytest
from conftest import small_options
from pages import PAGES, commands_of, main_of, python_of

from cge_fast import train

TRAININGS = ("cge_fast.train", "cge_fast.experiments.variants")
RUN = (*TRAININGS, "cge_fast.evaluate", "cge_fast.export", "cge_fast.analyze")
WHOLE = [
    command
    for page in PAGES
    for command in commands_of(page)
    if command.program in RUN
    and not (command.is_mention and (command.program not in TRAININGS or not command.arguments))
]
COMMANDS = {(each.program, each.arguments): each for each in WHOLE}.values()
BLOCKS = [page for page in PAGES if python_of(page.read_text())]
BACKBONE = "--model.backbone compact --model.stem torchvision --model.non_local none"
TINY = f"{BACKBONE} --model.pretrained false --model.weights null".split()

pytestmark = pytest.mark.slow


@pytest.fixture
def runs(shared_run, tmp_path, monkeypatch):
    """Makes the runs that a text names in the current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)

    def make(text: str) -> None:
        for name in set(re.findall(r"\bruns/[\w-]+", text)):
            shutil.copytree(shared_run, tmp_path / name, symlinks=True)

    return make


@pytest.fixture
def shortened(shared_market):
    """The arguments of a new training, with those of a tiny one that are not among them."""

    def add(arguments: list[str]) -> list[str]:
        arguments = list(arguments)
        tiny = [*small_options(shared_market, "runs/tiny"), *TINY]
        for option, value in zip(tiny[::2], tiny[1::2], strict=True):
            if option not in arguments:
                arguments += [option, value]
        return arguments

    return add


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_runs(command, runs, shortened, shared_market, shared_crops):
    arguments = list(command.arguments)
    is_new = command.program in TRAININGS and "--resume" not in arguments
    if is_new:
        arguments = shortened(arguments)
    given = dict(pairwise(arguments))
    is_folder = given.get("--data.name") == "folder"
    if "--data.name" in given and not is_folder:  # tests/cge_fast/data has the other formats
        arguments[arguments.index("--data.name") + 1] = "market1501"
    if "--data.root" in given:
        arguments[arguments.index("--data.root") + 1] = str(shared_crops if is_folder else shared_market)
    runs(" ".join(word for word in arguments if not is_new or word != given["--output"]))
    main_of(command.program)(arguments)


def readme(scope, printed):
    assert scope["embedding"].shape == (16, 512)
    assert scope["head"].loss.memory.norm(dim=2).sum() > 0


def kernels(scope, printed):
    assert scope["revised"].shape == (8, 10)
    assert scope["stripes"].shape == (8, 3, 64)


def analysis(scope, printed):
    assert printed.startswith("mine: easiest ")


# What must have come of a page's Python, besides that it ran.
RESULTS = {"README.md": readme, "kernels.md": kernels, "analysis.md": analysis}


@pytest.mark.parametrize("page", BLOCKS, ids=lambda page: page.name)
def test_a_pages_python_runs(page, runs, shortened, capsys, monkeypatch):
    """All of it in one scope, as a reader would type it."""
    main, scope = train.main, {}
    monkeypatch.setattr(train, "main", lambda arguments, **keywords: main(shortened(arguments), **keywords))
    code = "\n".join(python_of(page.read_text()))
    runs(code)
    exec(code, scope)
    RESULTS.get(page.name, lambda *_: None)(scope, capsys.readouterr().out)

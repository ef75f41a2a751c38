"""The Python of README and docs runs, and so do the commands that train and that use a trained network.

Trainings are cut short: a tiny set and network, two epochs of three steps, unless the command says otherwise. What
torchrun would start runs as one process.
"""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import onnxruntime
import PIL.Image
import pytest
import torch
from conftest import small_options
from pages import PAGES, Command, commands_of, main_of, python_of

from cge_fast import export, train

TRAININGS = ("cge_fast.train", "cge_fast.experiments.variants")
RUN = (*TRAININGS, "cge_fast.evaluate", "cge_fast.export", "cge_fast.analyze")
WRITTEN_BEFORE = (".npz", ".parquet")  # what needs them is parsed alone


def is_run(command: Command) -> bool:
    """Whether it trains or takes a trained network, and is whole."""
    if command.program not in RUN or any(word.endswith(WRITTEN_BEFORE) for word in command.arguments):
        return False
    return not command.is_mention or (command.program in TRAININGS and bool(command.arguments))


WHOLE = [command for page in PAGES for command in commands_of(page) if is_run(command)]
COMMANDS = {(each.program, each.arguments): each for each in WHOLE}.values()
BLOCKS = [page for page in PAGES if python_of(page.read_text())]
BACKBONE = "--model.backbone compact --model.stem torchvision --model.non_local none"
TINY = f"{BACKBONE} --model.pretrained false --model.weights null".split()

pytestmark = pytest.mark.slow


@pytest.fixture
def provide(shared_run, tmp_path, monkeypatch):
    """Makes what a text names, in the current folder, which is the test's own: runs, photos, settings, an export."""
    monkeypatch.chdir(tmp_path)

    def make(text: str) -> None:
        for name in set(re.findall(r"\bruns/[\w-]+", text)):
            shutil.copytree(shared_run, name, symlinks=True)
        for name in set(re.findall(r"\b\w+\.jpg", text)):
            PIL.Image.effect_mandelbrot((45, 90), (-2, -1, 1, 1), 50).convert("RGB").save(name)
        for name in set(re.findall(r"(?<!/)\b\w+\.yaml", text)):
            Path(name).write_text("optim: {gamma: 0.2}")
        for name in set(re.findall(r"\bmodel\.(?:onnx|pt2)\b", text)):
            export.main(["--checkpoint", str(shared_run), "--output", name])

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
def test_a_command_runs(command, provide, shortened, shared_market, shared_crops):
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
    written = "" if "--resume" in arguments else given.get("--output")
    provide(" ".join(word for word in arguments if word != written))
    main_of(command.program)(arguments)


def readme(scope, printed):
    assert scope["embedding"].shape == (16, 512)
    assert scope["head"].loss.memory.norm(dim=2).sum() > 0


def kernels(scope, printed):
    assert scope["revised"].shape == (8, 10)
    assert scope["stripes"].shape == (8, 3, 64)


def analysis(scope, printed):
    assert printed.startswith("mine: easiest ")


def evaluation(scope, printed):
    assert scope["features"].shape == (2, 128)


def deployment(scope, printed):
    def embeddings(file, images):
        return torch.from_numpy(onnxruntime.InferenceSession(file).run(None, images)[0])

    assert len(scope["embeddings"]) == 5
    told = scope["told"]
    images = torch.randint(256, (7, 3, int(told["height"]), int(told["width"])), dtype=torch.uint8).numpy()
    whole, half = (embeddings(file, {"images": images}) for file in ("model.onnx", "half.onnx"))
    assert whole.dtype == half.dtype
    assert torch.cosine_similarity(whole, half).min() > 1 - 2**-10  # float16 keeps 11 binary digits
    assert len(embeddings("own.onnx", {"input": torch.rand(7, 3, 96, 48).numpy()})) == 7


# What must have come of a page's Python, besides that it ran.
RESULTS = {
    "README.md": readme,
    "kernels.md": kernels,
    "analysis.md": analysis,
    "evaluation.md": evaluation,
    "export.md": deployment,
}


@pytest.mark.parametrize("page", BLOCKS, ids=lambda page: page.name)
def test_a_pages_python_runs(page, provide, shortened, capsys, monkeypatch):
    """All of it in one scope, as a reader would type it."""
    main, scope = train.main, {}
    monkeypatch.setattr(train, "main", lambda arguments, **keywords: main(shortened(arguments), **keywords))
    code = "\n".join(python_of(page.read_text()))
    provide(code)
    exec(code, scope)
    RESULTS.get(page.name, lambda *_: None)(scope, capsys.readouterr().out)

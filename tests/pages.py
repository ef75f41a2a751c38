"""The pages of the documentation, and the commands and the Python that they show."""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^ {4}(.*)$", re.MULTILINE)
STARTS_OURS = re.compile(r"(?:^|[\s/])(?:python3?|torchrun|pip|pytest|cge-(?!fast)\w+)(?:\s|$)")
LAUNCHERS = ("torch.distributed.run", "cge_fast.torchrun")
# What stands for something of the reader's, and what a command is tried with; other such words do as they are.
STANDS_FOR = {"COMMAND": "operators", "NAME": "market1501", "S": "0", "$seed": "0", "...": ""}
RECIPE = "pedestrians_cge"  # for a reader's file of settings


@dataclass(frozen=True)
class Command:
    """A module, `pip`, `pytest` or a script, and its arguments."""

    page: str
    program: str
    arguments: tuple[str, ...]
    is_mention: bool  # in a sentence or table, where what is required may be left out

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join([self.program, *self.arguments])}"


def python_of(text: str) -> list[str]:
    """The Python blocks of a page."""
    return [code for language, code in FENCE.findall(text) if language == "python"]


def lines_of(text: str) -> list[str]:
    """The lines of a page's other blocks, fenced or indented; those that a backslash continues are one."""
    fenced = [code for language, code in FENCE.findall(text) if language != "python"]
    return re.sub(r"\\\n\s*", "", "\n".join([*fenced, *INDENTED.findall(FENCE.sub("", text))])).splitlines()


def spans_of(text: str) -> list[str]:
    """What stands between backticks in a page's sentences and tables."""
    prose = INDENTED.sub("", FENCE.sub("", text))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands_of(page: Path) -> Iterator[Command]:
    """Every command of a page whose program is Python, torchrun, pip, pytest or one of ours.

    A page may abbreviate: `T` stands for `python -m cge_fast.train`.
    """
    text = page.read_text()
    abbreviations = dict(re.findall(r"`([A-Z])`(?: stands)? for `(python [^`]+)`", " ".join(text.split())))
    shown = [(line, False) for line in lines_of(text)] + [(span, True) for span in spans_of(text)]
    for line, is_mention in shown:
        first, blank, rest = line.partition(" ")
        line = abbreviations.get(first, first) + blank + rest
        if STARTS_OURS.search(line):
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)  # leaves comments out
            lexer.whitespace_split = True
            words = list(lexer)
            while words:
                end = next((at for at, word in enumerate(words) if set(word) <= set(";&|")), len(words))
                yield from command(page.name, words[:end], is_mention)
                words = words[end + 1 :]


def filled(words: list[str]) -> list[str]:
    """The words with something in the place of what is the reader's."""
    pairs = zip(["", *words], words, strict=False)
    found = [RECIPE if pair == ("--config", "NAME") else STANDS_FOR.get(pair[1], pair[1]) for pair in pairs]
    return [word for word in found if word]


def command(page: str, words: list[str], is_mention: bool) -> Iterator[Command]:
    """The command of these words of a shell, or none."""
    words = filled(words)
    while words and re.fullmatch(r"\w+=.*|do|time|nice|-n|\d+", words[0]):
        words = words[1:]
    name, *rest = words or [""]
    name = Path(name).name
    if re.fullmatch(r"python3?", name) and rest:
        is_module = rest[0] == "-m"
        name, *rest = rest[1:] if is_module else ["python", *rest]
    elif name == "torchrun":
        name = "torch.distributed.run"
    elif name.startswith("cge-"):
        name = name.replace("cge-", "cge_fast.")
    elif name not in ("pip", "pytest"):
        return
    if name != "venv":
        yield Command(page, name, tuple(rest), is_mention)
    if name in LAUNCHERS and "-m" in rest:
        yield from command(page, ["python", *rest[rest.index("-m") :]], is_mention)


def main_of(program: str) -> Callable | None:
    """The function that reads the command line of a module, or None if it reads none."""
    spec = find_spec(program)
    assert spec, f"there is no module {program}"
    module = import_module(f"{program}.__main__" if spec.submodule_search_locations else program)
    return getattr(module, "main", None)

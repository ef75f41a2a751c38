"""What README and docs tell to type is what the programs take. Commands run in test_pages_run.py."""

import argparse
import re
import subprocess
import sys
import tomllib
from functools import cache

import jsonargparse
import pytest
from pages import PAGES, RECIPE, ROOT, commands_of, filled, lines_of, main_of, spans_of

import bench.__main__

SHOWN = sorted((each for page in PAGES for each in commands_of(page)), key=lambda each: not each.is_mention)
COMMANDS = {(each.program, each.arguments): each for each in SHOWN}.values()  # of two alike the one that is no mention
OURS = [each for each in COMMANDS if each.program not in ("pip", "pytest", "python")]
WITH_OPTION = {each.program: each for each in OURS if any(word.startswith("--") for word in each.arguments)}
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which speaks of what earlier editions had, too
OPTIONS = sorted({span for page in PRESENT for span in spans_of(page.read_text()) if span.startswith("--")})
OF_OTHERS = {"--shm-size", "--benchmark-autosave", "--benchmark-compare"}  # in sentences: Docker's and pytest's options


class Reached(BaseException):
    """A program is about to parse its command line; it goes no further."""


def parser_of(program: str, arguments: tuple[str, ...]) -> tuple[argparse.ArgumentParser, list[str]]:
    """A program's parser, and what the program gives it to parse of the arguments."""

    def stop(self, given=None, *_, **__):
        raise Reached(self, sys.argv[1:] if given is None else list(given))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            patch.setattr(kind, "parse_args", stop)
        try:
            main_of(program)()
        except Reached as reached:
            return reached.args
    raise AssertionError(f"{program} has no parser")


def parse(program: str, arguments: tuple[str, ...]) -> None:
    """Raises unless the program takes the arguments, and a training those after `--`, which it hands on.

    A reader's file of settings is taken for a recipe.
    """
    arguments = tuple(RECIPE if word.endswith(".yaml") else word for word in arguments)
    if main_of(program) is None:
        assert not arguments, f"{program} takes no arguments"
        return
    parser, given = parser_of(program, arguments)
    try:
        parser.parse_args(given)
    except SystemExit as ended:  # as --help and --print_config end
        if ended.code:
            raise
    if "--" in arguments:
        parse("cge_fast.train", arguments[arguments.index("--") + 1 :])


@pytest.mark.filterwarnings("error:Option .* was expanded")
@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_program_takes_the_command(command):
    if command.is_mention and not command.arguments:
        main_of(command.program)
        return
    try:
        parse(command.program, command.arguments)
    except jsonargparse.ArgumentError as error:  # what a program does not know, it says before what is missing
        if not (command.is_mention and re.search("are required|not provided", str(error))):
            raise


@pytest.mark.parametrize("command", WITH_OPTION.values(), ids=str)
def test_a_misspelt_option_would_be_noticed(command, capsys):
    option = next(word for word in command.arguments if word.startswith("--"))
    misspelt = tuple(f"{word}x" if word == option else word for word in command.arguments)
    with pytest.raises((jsonargparse.ArgumentError, SystemExit)) as raised:
        parse(command.program, misspelt)
    assert f"unrecognized arguments: {option}x" in f"{raised.value} {capsys.readouterr().err}"


@cache
def known_options() -> set[str]:
    """The options of all programs that the pages name."""

    def options(parser: argparse.ArgumentParser) -> set[str]:
        found = set(parser._option_string_actions)
        for action in parser._actions:
            for choice in action.choices.values() if isinstance(action.choices, dict) else ():
                found |= options(choice)
        return found

    measurements = [("bench", (name,)) for name in bench.__main__.COMMANDS]
    programs = [(each.program, ()) for each in OURS if each.program != "bench" and main_of(each.program)]
    return OF_OTHERS.union(*(options(parser_of(*program)[0]) for program in {*measurements, *programs}))


@pytest.mark.parametrize("span", OPTIONS)
def test_an_option_in_a_sentence_is_one_of_the_programs(span):
    """Where all are a training's, their values too are what it takes."""
    words = filled(span.split())
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        stem, star, _ = option.partition("*")
        known = [name for name in known_options() if (name.startswith(stem) if star else name == option)]
        assert known, option
    parser, _ = parser_of("cge_fast.train", ())
    if len(words) > 1 and all(word in parser._option_string_actions for word in words if word.startswith("--")):
        parse("cge_fast.train", tuple(words))


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.program == "pip"], ids=str)
def test_extras_to_install_are_the_projects(command):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = re.findall(r"(?:\.|cge-fast)\[([\w,]+)\]", " ".join(command.arguments))
    assert {name for names in told for name in names.split(",")} <= extras.keys()


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in COMMANDS if each.program == "pytest"], ids=str)
def test_pytest_takes_the_command(command, tmp_path):
    places = [word for word in command.arguments if "/" in word]
    assert all((ROOT / place).exists() for place in places)
    options = [word for word in command.arguments if word not in places]
    arguments = [sys.executable, "-m", "pytest", "--collect-only", "--rootdir", tmp_path, *options, tmp_path]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stderr


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.program == "python"], ids=str)
def test_scripts_are_there(command):
    assert (ROOT / command.arguments[0]).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_that_a_page_shows_is_marked_as_such_so_that_it_runs(page):
    assert [line for line in lines_of(page.read_text()) if re.match(r"\s*(from|import) ", line)] == []

"""What a setting may be, in words: for the one line that a wrong one ends with."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from cge_fast.options import SeveralSets, TimmName, TrainConfig

# Of jsonargparse's messages, those that name a setting: a value of the wrong kind, and names that are not known.
WRONG_VALUE = re.compile(r'Parser key "([\w.]+)":')
UNKNOWN = re.compile(
    r"unrecognized arguments: --([^\s=]+)|Group '(\w+)' does not accept option '(.+)'|Option '(.+)' is"
)

STRINGS = {SeveralSets: "several of them, like a+b", TimmName: "timm:NAME"}


def types_of(kind: type) -> dict[str, Any]:
    """The types of a dataclass's settings by their names, those of sections like optim.lr."""
    types: dict[str, Any] = {}
    for setting in fields(kind):
        is_section = is_dataclass(setting.type)
        inner = types_of(setting.type) if is_section else {}  # type: ignore[arg-type]
        types |= {f"{setting.name}.{name}": type_ for name, type_ in inner.items()}
        types |= {} if is_section else {setting.name: setting.type}
    return types


TYPES = types_of(TrainConfig)


def wanted(kind: Any) -> str:
    """What a value of the type is, like `a number above 0, at most 1`."""
    if get_origin(kind) is Literal:
        return ("one of " if len(get_args(kind)) > 1 else "") + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list like 10,20, each {wanted(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"a mapping like {{name: 1}}, each value {wanted(get_args(kind)[1])}"
    if get_args(kind):
        return ", or ".join(map(wanted, get_args(kind)))
    if kind in STRINGS:
        return STRINGS[kind]
    if bounds := getattr(kind, "_expression", ""):
        for sign, word in (("v>=", "at least "), ("v<=", "at most "), ("v>", "above "), ("v<", "below ")):
            bounds = bounds.replace(sign, word)
        return f"a {'whole ' if issubclass(kind, int) else ''}number {bounds.replace(' and ', ', ')}"
    return {bool: "true or false", Path: "a path", type(None): "null"}.get(kind, kind.__name__)


def value_given(name: str, arguments: Sequence[str]) -> str | None:
    """The last value that a command line gives to an option; None if it does not name it."""
    given = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option == f"--{name}":
            given = value if equals else following
    return given


def value_in(file: Path, name: str) -> tuple[int, str | None]:
    """The line of a file of settings that gives one a value, and that; 0 and None if none does."""
    node, line = yaml.compose(file.read_text(), yaml.SafeLoader), 0
    for part in name.split("."):
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == part:
                node, line = value, key.start_mark.line + 1
                break
        else:
            return 0, None
    return line, file.read_text()[node.start_mark.index : node.end_mark.index].strip()


def explained(message: str, known: Iterable[str], arguments: Sequence[str] = (), file: Path | None = None) -> str:
    """jsonargparse's message with where the setting stands, what it may be, and, of an unknown one, what is like it.

    Args:
        message: of its error.
        known: names of options.
        arguments: the command line that it parsed.
        file: the settings that it parsed instead.
    """
    value, unknown = WRONG_VALUE.search(message), UNKNOWN.search(message)
    if not value and not unknown:
        return f"{file}: {message}" if file else message
    name = value[1] if value else ".".join(part for part in unknown.groups() if part)  # type: ignore[union-attr]
    line, given = value_in(file, name) if file else (0, value_given(name, arguments))
    where = f"{file}, line {line}: " if line else f"{file}: " if file else ""
    if unknown and name in TYPES:
        return f"{where}{name} is not read here"
    if unknown:
        names = [*known]
        close = get_close_matches(name, names, n=1) or [other for other in names if other.endswith(f".{name}")]
        dashes = "" if file else "--"
        return f"{where}there is no {dashes}{name}" + (f", did you mean {dashes}{close[0]}?" if close else "")
    if name not in TYPES or given is None:
        return f"{where}{message.replace(value[0], f'{name}:')}"  # type: ignore[index]
    return f"{where}{name}: must be {wanted(TYPES[name])}, got {given}"

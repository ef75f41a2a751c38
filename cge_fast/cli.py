"""Command lines and settings files: recipes, YAML, and the names that options once had."""

import re
from argparse import SUPPRESS
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from cge_fast.errors import UserError
from cge_fast.files import at_home
from cge_fast.options import TrainConfig
from cge_fast.wanted import TYPES, explained

Settings = TypeVar("Settings")

RECIPES = Path(__file__).parent / "recipes"
VARIANTS = "cge_fast.experiments.variants"

RENAMED = {
    "loss.l1": "loss.classification_weight",
    "loss.l2": "loss.metric_weight",
    "loss.centre": "loss.center_weight",
    "loss.centre_lr": "loss.center_lr",
    "model.alpha": "model.memory_momentum",
    "kernels": "backend",
}
BACKENDS = {"fused": "auto", "one_pass": "auto", "reference": "reference"}  # of what `kernels` could be
# Options that are now a loss.variant, and the variants' names for their values but the published one.
NOW_VARIANT: dict[str, dict[Any, str]] = {
    "loss.classification": {"focal": "cge_focal", "sphere": "cge_sphere"},
    "model.revision": {"none": "memory_not_used", "features": "revised_maps"},
    "model.shuffle_memory": {True: "shuffled_memory"},
    "model.local_gradient": {False: "detached_weights"},
    "model.logit_scale": {"any": "cge_scaled"},
}

# What is no longer there, and what to take instead.
GONE = {
    "cge_sphere": "--loss.metric sphere, which adds SphereFace to the cross entropy",
    "revised_maps": f"--loss.variant cge_feature, or feature without CGE, of {VARIANTS}",
}

SECTIONS = {section.name for section in fields(TrainConfig) if is_dataclass(section.type)}
NULLABLE = {"data.root", "model.weights", "output"}  # the settings that may be without a value
CONFIG = "config"  # the option that reads a file
CLASS_PATH = "class_path"  # jsonargparse would import what it names
LARGEST, DEEPEST, MOST = 100_000, 8, 500  # bytes, levels, and keys and values of a file of settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class HelpFormatter(DefaultHelpFormatter):
    """Help without the names of types, which the choices and the texts tell better."""

    def _expand_help(self, action: Any) -> str:
        return re.sub(r"\((required, )?type: .*?(, default: .*)?\)$", shortened, super()._expand_help(action))


def shortened(kind: re.Match) -> str:
    """What stays of jsonargparse's `(type: Size, default: 96)`."""
    required, default = kind.groups()
    return "(required)" if required else f"({default.removeprefix(', ')})" if default else ""


def program_parser(program: str, description: str, usage: str | None = None) -> ArgumentParser:
    """A typed command line whose errors are exceptions; `usage` is what follows the program's name."""
    return ArgumentParser(
        prog=program,
        description=description,
        usage=f"python -m {program} {usage}" if usage else None,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def add_settings(parser: ArgumentParser, kind: type, unread: Collection[str] = ()) -> None:
    """Adds the settings of a dataclass and of its sections, but those that the program does not read."""
    sections = {section.name: section.type for section in fields(kind) if is_dataclass(section.type)}
    parser.add_class_arguments(kind, skip={*sections, *(setting for setting in unread if "." not in setting)})
    for name, section in sections.items():
        skip = {setting.removeprefix(f"{name}.") for setting in unread if setting.startswith(f"{name}.")}
        parser.add_class_arguments(section, name, skip=skip)
        parser._option_string_actions[f"--{name}"].help = SUPPRESS  # a file for a section alone, which is refused


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def completed(arguments: Sequence[str]) -> list[str]:
    """The command line with recipes' names as paths after --config, and lists like 10,20 in brackets."""
    words = list(arguments)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not equals:
            option, value = words[index - 1] if index else "", word
        if option == "--config" and value in recipes():
            value = str(RECIPES / f"{value}.yaml")
        elif get_origin(TYPES.get(option[2:])) is list and value and value[0] not in "[-n":
            value = f"[{value}]"
        words[index] = f"{option}={value}" if equals else value
    return words


def parse_settings(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parses a command line; of --help the defaults are those of the files that --config names.

    Raises:
        UserError: a key is unknown or an old name, a value of the wrong type or out of range, a file not readable.
    """
    arguments, loaded, known = completed(arguments), [], parser.get_defaults(skip_validation=True).keys()
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        value = value if equals else "".join(arguments[index + 1 : index + 2])
        name = option[2:] if option.startswith("--") else ""
        refuse_old_name(name, value)
        # an option of a section's name, as experiments has --data, is no section
        if (name in SECTIONS and name not in known) or CLASS_PATH in option:
            raise UserError(f"{option.removeprefix('--')}: give settings one by one, like --optim.lr 1e-3")
        if name in NULLABLE and not value:
            raise UserError(f"{name}: must be a path, got nothing")
        if option == "--config" and value and option in parser._option_string_actions:
            loaded.append(load_yaml(Path(value)))
            for name, setting in flat(loaded[-1]):
                refuse_old_name(name, setting, f"{value}: ")
            with one_line_of_jsonargparse(parser, file=Path(value)):
                parser.parse_object(deepcopy(loaded[-1]))  # which changes what it is given
    for settings in loaded if {"-h", "--help"} & {*arguments} else ():
        parser.set_defaults({name: value for name, value in flat(settings) if name not in SECTIONS})
    with one_line_of_jsonargparse(parser, arguments):
        return parser.parse_args(arguments)


@contextmanager
def one_line_of_jsonargparse(
    parser: ArgumentParser, arguments: Sequence[str] = (), file: Path | None = None
) -> Iterator[None]:
    """What its parsing of a command line or a file raises becomes UserError."""
    try:
        yield
    except ArgumentError as error:
        known = parser.get_defaults(skip_validation=True).keys()
        raise UserError(explained(str(error), known, arguments, file)) from error
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"config: the settings cannot be read ({error})") from error


class SettingsLoader(yaml.SafeLoader):
    """YAML of settings: no aliases, by which a few lines become endless, no key twice, and no class to import."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, unless it is an alias or lies too deep."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not allowed")
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > DEEPEST or self.count > MOST:
            raise yaml.YAMLError(f"more than {DEEPEST} levels, or {MOST} keys and values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping, unless it names a key twice."""
        names = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if names[index] == CLASS_PATH:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: settings are data, no {CLASS_PATH} is imported")
            if names[index] in names[:index]:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {names[index]} is there more than once")
        return super().construct_mapping(node, deep)


def load_yaml(file: Path) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        UserError: there is no such file, or it does not hold YAML, or something else than settings and their sections.
    """
    if not file.is_file():
        raise UserError(f"config: {file} is neither a file nor a recipe; the recipes are {', '.join(recipes())}")
    try:
        if file.stat().st_size > LARGEST:
            raise yaml.YAMLError(f"more than {LARGEST} bytes")
        values = yaml.load(file.read_text(), SettingsLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"config: {file}{line}: cannot be read as YAML ({error.problem})") from error
    except (UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"config: {file} cannot be read as YAML in UTF-8 ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"config: {file} must hold settings, got {type(values).__name__}")
    for name in SECTIONS & values.keys():
        if not isinstance(values[name], dict):
            raise UserError(f"config: {file}: {name} must be a section of settings, got {type(values[name]).__name__}")
    if CONFIG in values:  # which would be read without these checks
        raise UserError(f"config: {file} must hold settings, not the name of another file of them ({CONFIG})")
    names = [name for name, _ in flat(values)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"config: {file}: {min(twice)} is there more than once")
    for name, value in flat(values):
        if value == "" if name in NULLABLE else value is None:
            raise UserError(f"config: {file}: {name} must have a value, got {'nothing' if value == '' else 'null'}")
    return values


def flat(values: Any) -> Iterator[tuple[str, Any]]:
    """(section.key or key, value) of settings as YAML has them."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", found) for inner, found in value.items())
        yield str(key), value


def refuse_old_name(name: str, value: Any, where: str = "") -> None:
    """Raises UserError, which says the new name, if `name` is one that an option once had."""
    if name in RENAMED:
        raise UserError(f"{where}{name} is now {RENAMED[name]}")
    if name in NOW_VARIANT:
        names = {str(key).lower(): variant for key, variant in NOW_VARIANT[name].items()}
        variant = names.get(str(value).lower(), next(iter(names.values())))
        raise UserError(f"{where}{name} is now {GONE.get(variant, f'--loss.variant {variant} of {VARIANTS}')}")


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of any edition with the names of this one."""
    old = dict(flat(values))
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for name in old.keys() & (RENAMED.keys() | NOW_VARIANT.keys()):
        section, _, key = name.rpartition(".")
        holder = values[section] if section else values
        del holder[key]
        if name in RENAMED:
            value = BACKENDS[old[name]] if name == "kernels" else old[name]
            holder[RENAMED[name].rpartition(".")[2]] = value
    parts = [names[old[name]] for name, names in NOW_VARIANT.items() if old.get(name) in names]
    scale = old.get("model.logit_scale", 1.0)
    if parts or scale != 1:
        variant = "_".join(parts) or "cge_scaled"
        cge = old.get("model.cge", True)
        values["loss"] = values.get("loss", {}) | {"variant": variant if cge else variant.removeprefix("cge_")}
        if scale != 1:
            values["loss"]["variant_args"] = {"scale": scale}
    return values


def as_dataclass(parser: ArgumentParser, parsed: Namespace, kind: type[Settings]) -> Settings:
    """The parsed settings as an instance of the dataclass whose fields the parser was given.

    Raises:
        UserError: a section is not a mapping, or a setting that must have a value has none.
    """
    for settings in fields(kind):
        if is_dataclass(settings.type) and not isinstance(parsed[settings.name], Namespace):
            raise UserError(f"{settings.name}: must be a section of settings, got {parsed[settings.name]!r}")
    with one_line_of_jsonargparse(parser):
        values = parser.instantiate(parsed)
    return plain(kind(**{settings.name: values[settings.name] for settings in fields(kind)}))


def plain(value: Any) -> Any:
    """Settings with ordinary numbers and text in place of the checked ones, which neither YAML nor torch.load knows.

    A path's leading ~ is the home folder.
    """
    if isinstance(value, Path):
        return at_home(value)
    if is_dataclass(value):
        return replace(value, **{settings.name: plain(getattr(value, settings.name)) for settings in fields(value)})
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if isinstance(value, float) else int(value)
    return value


def set_defaults(parser: ArgumentParser, config: TrainConfig, *names: str) -> None:
    """Makes settings the defaults of a parser's options; `names` are sections or keys, by default all."""
    known = parser.get_defaults(skip_validation=True)
    for name in names or [settings.name for settings in fields(config)]:
        value = getattr(config, name)
        values = (
            {f"{name}.{key}": inner for key, inner in asdict(value).items()} if is_dataclass(value) else {name: value}
        )
        parser.set_defaults({key: inner for key, inner in values.items() if key in known})


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML that --config reads back."""
    values = asdict(config)
    for section, key in ((values, "output"), (values["data"], "root"), (values["model"], "weights")):
        section[key] = None if section[key] is None else str(section[key])
    return yaml.safe_dump(values, sort_keys=False)


def read_settings(file: Path) -> TrainConfig:
    """The settings that `to_yaml` wrote, in this edition or an earlier one.

    Raises:
        UserError: the file is not such settings.
    """
    parser = settings_parser()
    with one_line_of_jsonargparse(parser, file=file):
        parsed = parser.parse_object(translated(load_yaml(file)))
    return as_dataclass(parser, parsed, TrainConfig)


@cache
def settings_parser() -> ArgumentParser:
    """The parser of settings files; made once, since that takes longer than to read one."""
    parser = program_parser("", "")
    add_settings(parser, TrainConfig)
    return parser

"""Command lines and settings files: recipes, YAML, and the names that options once had."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from cge_fast.errors import UserError
from cge_fast.options import TrainConfig

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
CLASS_PATH = "class_path"  # jsonargparse would import what it names
LARGEST, DEEPEST = 100_000, 8  # bytes and levels of a file of settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def program_parser(program: str, description: str) -> ArgumentParser:
    """A typed command line whose errors are exceptions."""
    return ArgumentParser(prog=program, description=description, exit_on_error=False, allow_abbrev=False)


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """The command line with `--config NAME` turned into the path of the recipe called so."""
    completed = list(arguments)
    for index, argument in enumerate(completed):
        option, equals, value = argument.partition("=")
        if option == "--config" and equals and value in recipes():
            completed[index] = f"--config={RECIPES / value}.yaml"
        elif index and completed[index - 1] == "--config" and argument in recipes():
            completed[index] = str(RECIPES / f"{argument}.yaml")
    return completed


def parse_settings(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parses a command line.

    Raises:
        ArgumentError, UserError: a key is unknown or an old name, a value of the wrong type or out of range, a file not
            readable.
    """
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        value = value if equals else "".join(arguments[index + 1 : index + 2])
        if option.startswith("--"):
            refuse_old_name(option[2:], value)
        if option[2:] in SECTIONS or CLASS_PATH in option:
            raise UserError(f"{option[2:]}: give settings one by one, like --optim.lr 1e-3")
        if option == "--config":
            for name, setting in flat(load_yaml(Path(value))):
                refuse_old_name(name, setting, f"{value}: ")
    with one_line_of_jsonargparse():
        return parser.parse_args(list(arguments))


@contextmanager
def one_line_of_jsonargparse() -> Iterator[None]:
    """What its parsing raises besides ArgumentError becomes UserError."""
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"config: the settings cannot be read ({error})") from error


class SettingsLoader(yaml.SafeLoader):
    """YAML of settings: no aliases, by which a few lines become endless, no key twice, and no class to import."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, unless it is an alias or lies too deep."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases are not allowed")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} levels")
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
        raise UserError(f"--config: there is no file {file}, and no recipe of that name, but {', '.join(recipes())}")
    try:
        if file.stat().st_size > LARGEST:
            raise yaml.YAMLError(f"more than {LARGEST} bytes")
        values = yaml.load(file.read_text(), SettingsLoader)
    except (UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"config: {file} cannot be read as YAML in UTF-8 ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"config: {file} must hold settings, got {type(values).__name__}")
    for name in SECTIONS & values.keys():
        if not isinstance(values[name], dict):
            raise UserError(f"config: {file}: {name} must be a section of settings, got {type(values[name]).__name__}")
    for name, value in flat(values):
        if value is None and name not in NULLABLE:
            raise UserError(f"config: {file}: {name} must have a value, got null")
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
    with one_line_of_jsonargparse():
        values = parser.instantiate(parsed)
    return plain(kind(**{settings.name: values[settings.name] for settings in fields(kind)}))


def plain(value: Any) -> Any:
    """Settings with ordinary values in place of the checked ones, which neither YAML nor torch.load knows."""
    if is_dataclass(value):
        return replace(value, **{settings.name: plain(getattr(value, settings.name)) for settings in fields(value)})
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if isinstance(value, float) else int(value)
    return str(value) if isinstance(value, str) else value


def set_defaults(parser: ArgumentParser, config: TrainConfig, *names: str) -> None:
    """Makes settings the defaults of a parser's options; `names` are sections or keys, by default all."""
    for name in names or [settings.name for settings in fields(config)]:
        value = getattr(config, name)
        values = (
            {f"{name}.{key}": inner for key, inner in asdict(value).items()} if is_dataclass(value) else {name: value}
        )
        parser.set_defaults(values)


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML that --config reads back."""
    values = asdict(config)
    for section, key in ((values, "output"), (values["data"], "root"), (values["model"], "weights")):
        section[key] = None if section[key] is None else str(section[key])
    return yaml.safe_dump(values, sort_keys=False)


def read_settings(file: Path) -> TrainConfig:
    """The settings that `to_yaml` wrote, in this edition or an earlier one.

    Raises:
        ArgumentError, UserError: the file is not such settings.
    """
    parser = settings_parser()
    with one_line_of_jsonargparse():
        parsed = parser.parse_object(translated(load_yaml(file)))
    return as_dataclass(parser, parsed, TrainConfig)


@cache
def settings_parser() -> ArgumentParser:
    """The parser of settings files; made once, since that takes longer than to read one."""
    parser = program_parser("", "")
    parser.add_class_arguments(TrainConfig)
    return parser

"""The tables are the paper's: numbers, rows, order and settings. Every row is a training that the program accepts."""

import csv
import re
from dataclasses import asdict
from functools import cache

import pytest

from cge_fast import train
from cge_fast.build import loss_class
from cge_fast.cli import RECIPES, as_dataclass, parse_settings, program_parser, read_settings
from cge_fast.experiments.presets import PRESETS, Place
from cge_fast.experiments.report import PAPER
from cge_fast.experiments.tables import AGW, NAMES, STARTS, TABLES, UPT, WITH, Row, comparison
from cge_fast.experiments.variants import VARIANTS
from cge_fast.losses.cge import CGELoss
from cge_fast.options import TrainConfig

CONTROLS = ["{}, logits x 0.5", "{}, logits x mean w", "CGE+{}, detached weights", "CGE+{}, shuffled memory"]


@cache
def parser():
    """What train.parse makes anew for every command line."""
    made = program_parser("", "")
    made.add_argument("--config", action="config")
    made.add_class_arguments(TrainConfig)
    return made


@cache  # tables share rows
def parsed(options: str, recipe: str = "cge_bot") -> TrainConfig:
    arguments = ["--config", recipe, *options.split()]
    return as_dataclass(parser(), parse_settings(parser(), arguments), TrainConfig)


with PAPER.open() as file:
    LINES = list(csv.DictReader(file))
PRINTED = {
    name: list(dict.fromkeys(line["row"] for line in LINES if line["table"] == name))
    for name in dict.fromkeys(line["table"] for line in LINES)
}


def of_paper(name: str) -> list[Row]:
    """The rows of a numbered table, each once, without what the paper lacks."""
    keys = [key for key in TABLES if re.fullmatch(rf"{name}[a-c]?", key)]
    return list(dict.fromkeys(row for key in keys for row in TABLES[key].rows))


def test_there_are_the_papers_tables_and_figures_and_their_parts():
    assert sorted(NAMES) == [
        "controls",
        *("figure4", "figure5", "figure5a", "figure5b", "figure6", "figure7", "table1", "table1a", "table1b", "table2"),
        *("table3", "table3a", "table3b", "table3c", "table4", "table5", "table6", "table7", "table8", "table9"),
    ]


@pytest.mark.parametrize("name", [name for name in PRINTED if name.startswith("table")])
def test_the_rows_and_their_order_are_the_papers(name):
    assert [row.name for row in of_paper(name)] == PRINTED[name]


def test_the_figures_rows_are_named_as_in_the_paper():
    assert set(PRINTED["figure5"]) <= {row.name for row in TABLES["figure5a"].rows}
    assert [row.name for row in TABLES["figure5b"].rows][:2] == PRINTED["figure5"]


def differing(row: Row) -> dict[str, object]:
    """The settings in which a row differs from CGE on what it starts from, but for LUPerson's."""
    base, own = asdict(parsed(WITH)), asdict(parsed(" ".join(row.options.replace(UPT, "").split())))
    return {
        key: own[section][key]
        for section in ("data", "model", "loss", "optim", "evaluation")
        for key in base[section]
        if base[section][key] != own[section][key]
    }


METRICS = {
    "CE": {"metric_weight": 0},
    "CE+Sphere": {"metric": "sphere"},
    "CE+Triplet": {},
    "CE+Lifted": {"metric": "lifted"},
    "CE+Instance": {"metric": "instance"},
    "CE+Contrast": {"metric": "contrastive"},
    "CE+Circle": {"metric": "circle"},
    "Logits": {},
    "BOT": {},
    "UPT-BOT": {},
    "AGW": {"non_local": "half", "pooling": "gem", "gem_learned": False, "metric": "wrt"},
}
METRICS["UPT-AGW"] = METRICS["AGW"]


def expected(name: str) -> dict[str, object]:
    """The settings that a row's name in the paper says, where they are not the paper's own (s_h 0.4, e 0.1, ...)."""
    if match := re.fullmatch(r"CGE\+UPT-BOT, n = (\d+)", name):
        return {} if match[1] == "3" else {"stripes": int(match[1])}
    if match := re.fullmatch(r"s_h (.+)", name):
        return {} if match[1] == "0.4" else {"erasing_area": float(match[1])}
    if match := re.fullmatch(r"smoothing (.+)", name):
        return {} if match[1] == "0.1" else {"label_smoothing": float(match[1])}
    if match := re.fullmatch(r"l1 (.+), l2 (.+)", name):
        return {} if match[1] == "1" else {"classification_weight": float(match[1]), "metric_weight": float(match[2])}
    if match := re.fullmatch(r"alpha (.+)", name):
        return {} if match[1] == "linear" else {"memory_momentum": match[1]}
    cge = {} if name.startswith("CGE+") else {"cge": False}
    if name.endswith("Feature"):
        return cge | {"variant": "feature" if cge else "cge_feature"}
    return cge | METRICS[name.removeprefix("CGE+")]


@pytest.mark.parametrize("name", [name for name in PRINTED if name.startswith("table")])
def test_the_settings_are_what_the_rows_name_says(name):
    for row in of_paper(name):
        assert differing(row) == expected(row.name), row.name
        uses_upt = name in ("table1", "table3", "table4") or "UPT" in row.name
        assert (UPT in row.options) == uses_upt, row.name


def test_table_2_and_the_figures_are_of_upt_bot_but_for_figure_6():
    assert [differing(row) for row in of_paper("table2")] == [{}, {"variant": "memory_not_used"}]
    assert all(UPT in row.options for row in of_paper("table2"))
    assert {key: all(UPT in row.options for row in TABLES[key].rows) for key in TABLES if "figure" in key} == {
        "figure4": True,
        "figure5a": True,
        "figure5b": True,
        "figure6": False,
        "figure7": True,
    }
    assert [differing(row).get("stripes", 3) for row in TABLES["figure5b"].rows[2:]] == [1, 2, 3, 4, 5, 6]
    assert [row.stripes for row in TABLES["figure6"].rows] == [12]


@pytest.mark.parametrize("part", "abc")
def test_table_3_is_measured_with_the_exponential_alpha_too(part):
    linear, exponential = TABLES[f"table3{part}"], TABLES[f"table3{part}-exponential"]
    assert [row.name for row in exponential.rows] == [row.name for row in linear.rows]
    for row, other in zip(exponential.rows, linear.rows, strict=True):
        assert differing(row) == differing(other) | {"memory_momentum": "exponential"}
    assert linear.seeds == exponential.seeds == 1


def test_the_controls_are_a_table_of_their_own_too_which_small_networks_start_from_imagenets_weights():
    assert TABLES["controls"].rows == comparison("BOT")
    for preset in PRESETS["small-pretrained"].values():
        config = parsed(preset.options.partition("pedestrians_pretrained")[2], "pedestrians_pretrained")
        assert (config.model.backbone, config.model.pretrained) == ("efficientnet_lite0", True)
        assert config.data.height // 16 == preset.rows


@pytest.mark.parametrize("table", list("1245679"))
def test_the_controls_stand_in_a_table_of_their_own(table):
    controls = [row for key, beside in TABLES.items() if key.startswith(f"table{table}-") for row in beside.rows]
    bases = {"9": ["BOT", "UPT-BOT", "AGW", "UPT-AGW"]}.get(table, ["UPT-BOT" if table in "124" else "BOT"])
    for base in bases:
        rows = [row.name for row in comparison(base, STARTS[base])]
        assert rows == [base, f"CGE+{base}", *(name.format(base) for name in CONTROLS)]
    assert controls == [row for base in bases for row in comparison(base, STARTS[base])]


def test_a_row_with_cge_is_compared_with_the_row_without():
    for table in TABLES.values():
        names = {row.name for row in table.rows}
        assert len(names) == len(table.rows)
        for row in table.rows:
            assert row.base in names | {None}
            assert (row.base is None) or row.name.startswith(("CGE+" + row.base, row.base + ", "))
    assert [row.base for row in TABLES["table6"].rows] == [None, "Feature", None, "Logits"]


def test_the_controls_change_one_thing_each():
    rows = comparison("circle", "--loss.metric circle")
    base, *others = (asdict(parsed(row.options)) for row in rows)
    differ = [
        {
            key: other[section][key]
            for section in ("data", "model", "loss", "optim")
            for key in base[section]
            if base[section][key] != other[section][key]
        }
        for other in others
    ]
    assert differ == [
        {"cge": True},
        {"variant": "scaled", "variant_args": {"scale": 0.5}},
        {"variant": "scaled"},
        {"cge": True, "variant": "detached_weights"},
        {"cge": True, "variant": "shuffled_memory"},
    ]
    assert rows[3].scaled_by == f"{WITH} --loss.metric circle"
    assert all(settings["loss"]["metric"] == "circle" for settings in (base, *others))


@pytest.mark.parametrize("table", TABLES)
def test_every_rows_options_are_settings(table):
    for row in TABLES[table].rows:
        config = parsed(row.options)
        assert config.model.cge == row.options.startswith(WITH)
        assert issubclass(loss_class(config, VARIANTS), CGELoss) == config.model.cge
        assert config.model.stripes == row.stripes


@pytest.mark.parametrize("recipe", ["bot", "agw", "upt_bot", "upt_agw"])
def test_the_papers_preset_with_a_rows_options_is_the_recipe(recipe):
    preset = PRESETS["paper"]["market1501"].options
    options = STARTS[recipe.upper().replace("_", "-")]
    config, _, _ = train.parse([*f"{preset} {WITH} {options}".split(), "--output", "run"])
    config.output = None
    assert asdict(config) == asdict(read_settings(RECIPES / f"cge_{recipe}.yaml"))


def test_without_lupersons_weights_upt_bot_is_the_presets_own_bot(tmp_path):
    upt, bot = comparison("UPT-BOT", UPT), comparison("BOT")
    small = Place("pedestrians", PRESETS["small"]["pedestrians"], tmp_path, [])
    assert [(row.options, row.scaled_by) for row in small.fitted(upt)] == [(row.options, row.scaled_by) for row in bot]
    assert small.fitted(comparison("UPT-AGW", STARTS["UPT-AGW"]))[0].options.endswith(AGW)
    assert Place("msmt17", PRESETS["paper"]["msmt17"], tmp_path, []).fitted(upt) == upt

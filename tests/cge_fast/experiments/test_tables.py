"""Every row of every table is a training that the program accepts, and has its controls."""

from dataclasses import asdict
from functools import cache

import pytest

from cge_fast import train
from cge_fast.build import loss_class
from cge_fast.cli import RECIPES, as_dataclass, parse_settings, program_parser, read_settings, with_recipe_paths
from cge_fast.experiments.figures import ROWS
from cge_fast.experiments.presets import PRESETS
from cge_fast.experiments.tables import AGW, TABLES, UPT, WITH, comparison
from cge_fast.experiments.variants import VARIANTS
from cge_fast.losses.cge import CGELoss
from cge_fast.options import TrainConfig

CONTROLS = [", logits x 0.5", ", logits x mean w"]
OF_CGE = [", detached weights", ", shuffled memory"]


def parse(row):
    return parsed(row.options)


@cache
def parser():
    """What train.parse makes anew for every command line."""
    made = program_parser("", "")
    made.add_argument("--config", action="config")
    made.add_class_arguments(TrainConfig)
    return made


@cache  # tables share rows
def parsed(options):
    arguments = with_recipe_paths(["--config", "pedestrians_cge", *options.split()])
    return as_dataclass(parser(), parse_settings(parser(), arguments), TrainConfig)


SLOW = pytest.param("table7", marks=pytest.mark.slow)  # 60 rows


@pytest.mark.slow
@pytest.mark.parametrize("table", [SLOW if table == "table7" else table for table in (TABLES | ROWS)])
def test_every_rows_options_are_settings(table):
    rows = (TABLES | ROWS)[table]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        config = parse(row)
        assert config.model.cge == row.options.startswith(WITH)
        assert issubclass(loss_class(config, VARIANTS), CGELoss) == config.model.cge
        if config.model.cge:
            assert config.model.stripes == row.stripes


@pytest.mark.parametrize("table", TABLES)
def test_a_row_is_compared_with_a_row_of_its_table(table):
    names = {row.name for row in TABLES[table]}
    assert {row.base for row in TABLES[table]} <= names | {None}


@pytest.mark.parametrize("table", ["table4", "table5", "table6", "table7", "table8", "table9"])
def test_every_comparison_has_its_controls(table):
    names = {row.name for row in TABLES[table]}
    bases = {row.base for row in TABLES[table] if row.base}
    assert bases
    for base in bases:
        wanted = {base, f"CGE+{base}"} | {base + control for control in CONTROLS}
        assert wanted | {f"CGE+{base}{control}" for control in OF_CGE} <= names


@pytest.mark.parametrize("table", ["table1", "table2", "table3"])
def test_the_other_tables_have_the_controls_of_the_baseline(table):
    names = {row.name.removesuffix(", n = 3") for row in TABLES[table]}
    assert {"BOT"} | {"BOT" + control for control in CONTROLS} <= names
    assert {"CGE+BOT" + control for control in OF_CGE} <= names


def test_the_controls_change_one_thing_each():
    rows = comparison("circle", "--loss.metric circle")
    base, *others = (asdict(parse(row)) for row in rows)
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
        {"variant": "scaled", "variant_args": {"scale": 0.5}},
        {"variant": "scaled"},
        {"cge": True},
        {"cge": True, "variant": "detached_weights"},
        {"cge": True, "variant": "shuffled_memory"},
    ]
    assert rows[2].scaled_by == f"{WITH} --loss.metric circle"
    assert all(settings["loss"]["metric"] == "circle" for settings in (base, *others))


def test_the_controls_of_another_loss_have_it_too():
    rows = [parse(row) for row in comparison("focal", variant="focal")]
    assert [config.loss.variant for config in rows] == [
        *("focal", "focal", "focal", "cge_focal", "cge_focal_detached_weights", "cge_focal_shuffled_memory")
    ]
    assert rows[1].loss.variant_args == {"scale": 0.5}


def test_the_stripes_go_from_one_to_twelve():
    assert [row.stripes for row in TABLES["table1"] if row.name.startswith("CGE, n = ")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("recipe", "options"), [("cge_bot", ""), ("cge_agw", AGW), ("cge_upt_bot", UPT), ("cge_upt_agw", f"{AGW} {UPT}")]
)
def test_the_papers_preset_with_a_rows_options_is_the_recipe(recipe, options):
    preset = PRESETS["paper"]["market1501"].options
    config, _, _ = train.parse([*f"{preset} {WITH} {options}".split(), "--output", "run"])
    config.output = None
    assert asdict(config) == asdict(read_settings(RECIPES / f"{recipe}.yaml"))

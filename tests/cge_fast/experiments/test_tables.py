"""Every row of every table is a training that the program accepts, and has its controls."""

from dataclasses import asdict

import pytest

from cge_fast import train
from cge_fast.options import RECIPES, read_settings
from cge_fast.experiments.figures import ROWS
from cge_fast.experiments.presets import PRESETS
from cge_fast.experiments.tables import AGW, TABLES, UPT, WITH, comparison

CONTROLS = [", logits x 0.5", ", logits x mean w"]
OF_CGE = [", detached weights", ", shuffled memory"]


@pytest.mark.parametrize("table", [*TABLES, *ROWS])
def test_every_rows_options_are_settings(table):
    rows = (TABLES | ROWS)[table]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        config, _, _ = train.parse(["--config", "pedestrians_cge", *row.options, "--output", "run"])
        assert config.model.cge == (row.options[1] == "true")
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
    base, half, mean, cge, detached, shuffled = comparison("circle", "--loss.metric", "circle")
    parsed = [
        asdict(train.parse(["--config", "pedestrians_cge", *row.options, "--output", "run"])[0])
        for row in (base, half, mean, cge, detached, shuffled)
    ]
    differ = [
        {
            (section, key)
            for section in ("data", "model", "loss", "optim")
            for key in one[section]
            if one[section][key] != other[section][key]
        }
        for one, other in ((parsed[0], parsed[1]), (parsed[0], parsed[2]), (parsed[0], parsed[3]))
    ]
    assert differ == [{("model", "logit_scale")}, set(), {("model", "cge")}]
    assert mean.scaled_by == (*WITH, "--loss.metric", "circle")
    assert [parsed[4]["model"]["local_gradient"], parsed[5]["model"]["shuffle_memory"]] == [False, True]
    assert all(settings["loss"]["metric"] == "circle" for settings in parsed)


def test_the_stripes_go_from_one_to_twelve():
    assert [row.stripes for row in TABLES["table1"] if row.name.startswith("CGE, n = ")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("recipe", "options"), [("cge_bot", ()), ("cge_agw", AGW), ("cge_upt_bot", UPT), ("cge_upt_agw", (*AGW, *UPT))]
)
def test_the_papers_preset_with_a_rows_options_is_the_recipe(recipe, options):
    preset = PRESETS["paper"]["market1501"].options
    config, _, _ = train.parse([*preset, *WITH, *options, "--output", "run"])
    config.output = None
    assert asdict(config) == asdict(read_settings(RECIPES / f"{recipe}.yaml"))

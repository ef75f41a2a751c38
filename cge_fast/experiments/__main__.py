"""Trains the rows of the paper's tables and figures over several seeds: python -m cge_fast.experiments --help"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from cge_fast import errors
from cge_fast.cli import parse_settings, program_parser
from cge_fast.errors import UserError
from cge_fast.experiments import figures, report
from cge_fast.experiments.presets import DATA, DRAWN, PRESETS, place_of
from cge_fast.experiments.runs import run_rows
from cge_fast.experiments.tables import NAMES, OF_RECIPES, TABLES

PROGRAM = "cge_fast.experiments"


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parse_settings(option_parser(), arguments[:split])
    more, root_of = arguments[split + 1 :], dict(zip(needing_root(options), options.root, strict=True))
    data = options.data if options.names != [OF_RECIPES] else []
    places = [place_of(options.preset, name, root_of.get(name), options.output, more) for name in data]
    for key in (key for key in TABLES if key.startswith("figure") and key.startswith(tuple(options.names))):
        figures.require_fit(key, places)
    texts, failures = [], {}
    for name in options.names:
        tables = {key: table for key, table in TABLES.items() if key.startswith(name)}
        written, failed = [report.of_recipes()] if name == OF_RECIPES else [], {}
        for place in places if tables else ():
            rows = [row for table in tables.values() for row in place.trained(table.rows)]
            seeds = options.seeds or max(table.seeds for table in tables.values())
            failed_here = run_rows(place.output, rows, seeds, place.common, options.jobs)
            command = [name, "--preset", options.preset, "--data", place.data]
            command += ["--root", "DIR"] if place.data != DRAWN else []
            command += ["--seeds", str(options.seeds)] if options.seeds else []
            command += arguments[split:]
            written.append(report.write(shlex.join(command), tables, place, options.seeds, failed_here))
            failed |= failed_here
        print("\n".join(written))
        for key in [key for key in tables if key.startswith("figure") and not failed]:
            that_fit = [place for place in places if figures.fits(key, place)]
            for group in [that_fit] if key == figures.ACROSS_SETS else [[place] for place in that_fit]:
                where = group[0].output if len(group) == 1 else options.output
                print(figures.draw(key, group, where / key))
        texts += written
        failures |= failed
    if options.into:
        report.put(options.into, texts)
    if failures:
        (row, seed), message = next(iter(failures.items()))
        raise UserError(f"{len(failures)} trainings failed, first {row}, seed {seed}: {message}")


def option_parser() -> ArgumentParser:
    """The program's options."""
    titles = " ".join(f"{key}: {table.title}." for key, table in TABLES.items() if "-" not in key)
    parser = program_parser(
        PROGRAM,
        "Trains what tables and figures of the paper compare, with the same seeds, and writes them as Markdown and CSV "
        "(figures: PNG too). Trainings that are there already are not repeated, interrupted ones are continued. What "
        f"stands after -- goes to every training. {titles} {OF_RECIPES}: What differs between two AGWs, from the "
        "recipes.",
    )
    parser.add_argument("names", choices=NAMES, nargs="+", help="tables and figures; table3 is table3a, b and c")
    parser.add_argument("--data", choices=DATA, nargs="+", default=[DRAWN], help="data sets")
    roots = "folders of the data sets that are not drawn, one each"
    parser.add_argument("--root", type=Path, nargs="+", default=[], help=roots)
    presets = "paper: the recipe untouched; small: short trainings for two cores, of pedestrians and omniglot; "
    presets += "small-pretrained: the same from ImageNet's weights (needs the extra timm)"
    parser.add_argument("--preset", choices=list(PRESETS), default="paper", help=presets)
    parser.add_argument("--seeds", type=PositiveInt, help="trainings of each row; default 3, of table 3 one")
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder of the trainings and tables")
    parser.add_argument("--jobs", type=PositiveInt, default=1, help="trainings at a time, which share the cores")
    parser.add_argument("--into", type=Path, help="Markdown file whose marked part becomes the tables")
    return parser


def needing_root(options: Namespace) -> list[str]:
    """The data sets that are not drawn; UserError unless each has its folder."""
    sets = [name for name in options.data if name != DRAWN]
    if len(sets) != len(options.root):
        raise UserError(f"root: give a folder for each of {', '.join(sets) or 'no set'}, got {len(options.root)}")
    return sets


if __name__ == "__main__":
    errors.run(main, PROGRAM)

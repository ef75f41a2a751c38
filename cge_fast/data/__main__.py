"""Looks at a data set, or writes one in Market-1501's folder format: python -m cge_fast.data --help"""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from cge_fast import errors
from cge_fast.cli import parse_settings, program_parser
from cge_fast.data.contact_sheet import contact_sheet
from cge_fast.data.counts import count, require_published, table
from cge_fast.data.images import SPLITS
from cge_fast.data.market1501 import read_market1501
from cge_fast.data.omniglot import export_omniglot
from cge_fast.data.pedestrians import draw
from cge_fast.data.sets import SETS, read
from cge_fast.files import at_home
from cge_fast.options import DataConfig

PROGRAM = "cge_fast.data"
CONTACT_SHEET = "contact_sheet.png"
EXPORTED = {
    "pedestrians": "the embedded set",
    "pedestrians-trap": "the embedded set whose upper bodies tempt the global feature",
    "omniglot": "Omniglot's two small background archives: characters as identities, drawers as cameras",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    purpose = "Counts a data set's identities, images and cameras, or writes a set in Market-1501's format."
    parser = program_parser(PROGRAM, purpose)
    commands = parser.add_subcommands()

    def subcommand(name: str, verb: str, help_: str) -> ArgumentParser:
        command = program_parser(f"{PROGRAM} {name}", f"{verb} {help_}.")
        commands.add_subcommand(name, command, help=help_)
        return command

    for name, help_ in EXPORTED.items():
        command = subcommand(name, "Writes", help_)
        command.add_argument("--export", type=Path, required=True, help="folder to write to; new or empty")
        if name == "omniglot":
            command.add_argument("--source", type=Path, required=True, help="folder with the archives, unzipped")
    for name in SETS:
        help_ = f"counts of {name}, beside the published ones if there are any, and a contact sheet"
        command = subcommand(name, "Shows", help_)
        command.add_argument("--root", type=Path, required=True, help="folder of the data set")
        sheet = Path(f"{name}_{CONTACT_SHEET}")
        command.add_argument("--sheet", type=Path, default=sheet, help="file of the contact sheet, a PNG")
    parsed = parse_settings(parser, sys.argv[1:] if arguments is None else arguments)
    paths = {name: at_home(path) for name, path in parsed[parsed.subcommand].as_dict().items()}
    if parsed.subcommand in SETS:
        show(parsed.subcommand, paths["root"], paths["sheet"])
        return
    if parsed.subcommand == "omniglot":
        export_omniglot(paths["source"], paths["export"])
    else:
        draw(paths["export"], trap=parsed.subcommand == "pedestrians-trap")
    sheet = paths["export"] / CONTACT_SHEET
    contact_sheet(read_market1501(paths["export"]), sheet)
    print(f"{paths['export']} written; a look at it: {sheet}")


def show(name: str, root: Path, sheet: Path) -> None:
    """Prints the counts of a data set beside the published ones and writes its contact sheet.

    Raises:
        UserError: the set cannot be read, or its counts are not the published ones (after all is printed and written).
    """
    _, published = SETS[name]
    reid_set = read(DataConfig(name=name, root=root), needed=(), optional=SPLITS)  # type: ignore[arg-type]
    counts = count(reid_set)
    print(table(counts, published))
    contact_sheet(reid_set, sheet)
    print(f"a look at it: {sheet}")
    if published is not None:
        require_published(counts, published)


if __name__ == "__main__":
    errors.run(main, PROGRAM)

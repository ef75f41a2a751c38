"""Draws runs against each other on one page: python -m cge_fast.compare --help"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cge_fast import errors, files
from cge_fast.charts import Series, chart
from cge_fast.cli import parse_settings, program_parser
from cge_fast.errors import UserError
from cge_fast.page import page, table
from cge_fast.report import CURVES, FIGURES, Recorded, figures, read_run, series_of, settings

PROGRAM = "cge_fast.compare"
NOTHING = "-"  # where a run has no such figure or setting


def names(folders: Sequence[Path]) -> list[str]:
    """What to call the runs: by as many last folders of their paths as tell all apart.

    Raises:
        UserError: a run is there twice.
    """
    paths = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, paths)) + 1):
        named = ["/".join(parts[-count:]) for parts in paths]
        if len(set(named)) == len(named):
            return named
    raise UserError(f"runs: {next(path for path in folders if folders.count(path) > 1)} is there twice")


def curves(runs: dict[str, Recorded]) -> str:
    """A chart of each figure, with a curve for each run that has it; of several stripes their mean."""
    charts = []
    for title, (percent, keys) in CURVES.items():
        for name, key in keys.items():
            series = []
            for label, run in runs.items():
                found = series_of(run.rows, label, key)
                points = zip(*(one.points for one in found), strict=True)
                mean = [(several[0][0], sum(value for _, value in several) / len(several)) for several in points]
                series += [Series(label, mean)] if found else []
            if series:
                shown = title if len(keys) == 1 else name if percent else f"{title}, {name}"
                charts.append(chart(shown, series, percent))
    return f'<div class="grid-of">{"".join(charts)}</div>'


def html(runs: dict[str, Recorded]) -> bytes:
    """The page about the runs, by their names."""
    found = {name: figures(run) for name, run in runs.items()}
    head = [*FIGURES, *(key for key in next(iter(found.values())) if key not in FIGURES)]
    last = table([[name, *(of.get(key, NOTHING) for key in head)] for name, of in found.items()], ["run", *head], True)
    of_runs = [settings(run.config) for run in runs.values()]
    every = dict.fromkeys(setting for of in of_runs for setting in of)
    rows = [[setting, *(of.get(setting, NOTHING) for of in of_runs)] for setting in every]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    different = table(differing, ["setting", *runs]) if differing else "<p>All settings are the same.</p>"
    sections = {"Last evaluation": last, "Settings that differ": different, "Training": curves(runs)}
    return page(f"{len(runs)} runs", ", ".join(runs), sections)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = program_parser(PROGRAM, "Draws runs against each other on one page.", "RUN RUN ... [--output FILE]")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page")
    parsed = parse_settings(parser, sys.argv[1:] if arguments is None else arguments)
    runs = dict(zip(names(parsed.runs), map(read_run, parsed.runs), strict=True))
    files.replace(parsed.output, html(runs))
    print(parsed.output)


if __name__ == "__main__":
    errors.run(main, PROGRAM)

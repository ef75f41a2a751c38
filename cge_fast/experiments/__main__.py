"""Trains the rows of a table or figure over several seeds and writes it: python -m cge_fast.experiments --help"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from cge_fast import errors
from cge_fast.errors import UserError
from cge_fast.experiments import figures, report
from cge_fast.experiments.presets import DATA, PRESETS, preset_of
from cge_fast.experiments.runs import is_whole, run, run_rows
from cge_fast.experiments.tables import TABLES, TITLES

PROGRAM = "cge_fast.experiments"


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    titles = TITLES | figures.TITLES
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Trains what a table or figure of the paper compares, with the same seeds, and writes it as "
        "Markdown and CSV (figures: PNG and CSV). Trainings that are there already are not repeated, "
        "interrupted ones are continued. " + " ".join(f"{name}: {title}." for name, title in titles.items()),
        epilog="What stands after -- goes to every training.",
        exit_on_error=False,
    )
    parser.add_argument("table", choices=list(titles), help="which table or figure")
    parser.add_argument("--data", choices=DATA, default="pedestrians", help="data set")
    parser.add_argument("--root", type=Path, default=None, help="folder of a data set that is not drawn")
    presets = "paper: the recipe untouched; small: short trainings for two cores, of pedestrians and omniglot"
    parser.add_argument("--preset", choices=list(PRESETS), default="paper", help=presets)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row of a table, seeds 0, 1, ...")
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder of the trainings and tables")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the processor's cores")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    for name in ("seeds", "jobs"):
        if options[name] < 1:
            raise UserError(f"{name}: must be at least 1, got {options[name]}")
    preset = preset_of(options.preset, options.data, options.root)
    output = options.output / f"{options.data}-{options.preset}"
    common = shlex.split(preset.options)
    if preset.first:
        folder = output / "first"
        if not is_whole(folder):
            print(f"first, the backbone that every training starts from: {folder}", file=sys.stderr)
            run(folder, shlex.split(preset.first()))
        common += ["--model.weights", str(folder / "checkpoints" / "last" / "model.safetensors")]
    common += arguments[split + 1 :]
    rows = (TABLES | figures.ROWS)[options.table]
    small = options.preset == "small"
    rows_that_fit = [row for row in rows if row.stripes <= preset.rows and not (small and row.resnet50)]
    is_figure = options.table in figures.TITLES
    failures = run_rows(output, rows_that_fit, 1 if is_figure else options.seeds, common, options.jobs)
    if is_figure:
        require_none(failures)
        print(figures.draw(options.table, output))
        return
    command = ["python", "-m", PROGRAM, *arguments]
    print(report.write(options.table, options.data, output, rows, options.seeds, common, failures, command))
    require_none(failures)


def require_none(failures: dict[tuple[str, int], str]) -> None:
    """Raises UserError with the first of the trainings that failed."""
    if failures:
        (row, seed), message = next(iter(failures.items()))
        raise UserError(f"{len(failures)} trainings failed, first {row}, seed {seed}: {message}")


if __name__ == "__main__":
    errors.run(main, PROGRAM)

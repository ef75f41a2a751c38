"""Writes a page about a run, report.html in its folder: python -m cge_fast.report --help"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import cge_fast
from cge_fast import errors, files
from cge_fast.charts import Series, chart
from cge_fast.cli import SECTIONS, flat, parse_settings, program_parser, read_settings, to_yaml
from cge_fast.errors import UserError
from cge_fast.log import read_rows, retrieval_text
from cge_fast.options import TrainConfig
from cge_fast.page import cards, page, table

if TYPE_CHECKING:
    import torch

    from cge_fast.analyze.trained import Trained
    from cge_fast.build import Run

PROGRAM = "cge_fast.report"
REPORT, ENVIRONMENT = "report.html", "environment.json"
NEEDED = "pip install 'cge-fast[analyze]'"
# Curves by title: whether they are shares, and the figures of metrics.jsonl by their names in the key.
CURVES: dict[str, tuple[bool, dict[str, str]]] = {
    "Retrieval": (True, {"mAP": "mAP", "rank-1": "rank1", "mINP": "mINP"}),
    "Loss": (False, {"in all": "loss", "classification": "classification", "metric": "metric", "center": "center"}),
    "Accuracy in training": (True, {"identities": "train_accuracy"}),
    "Learning rate": (False, {"rate": "lr"}),
    "Memory's momentum": (False, {"momentum": "momentum"}),
    "Revision weight w": (False, {"true class": "label_weight", "all classes": "mean_weight"}),
    "Precision of the stripes": (True, {"stripe": "stripe_precision"}),
    "Speed": (False, {"images/s": "images_per_second"}),
}
FIGURES = {"mAP": "mAP", "rank-1": "rank1", "rank-5": "rank5", "rank-10": "rank10", "mINP": "mINP"}


class Recorded(NamedTuple):
    """What a run's folder says of it."""

    folder: Path
    config: TrainConfig
    rows: list[dict[str, Any]]  # of metrics.jsonl, at least one

    @property
    def environment(self) -> dict[str, str]:
        """Where it was trained, read anew; empty if that was not noted, or, with a line on stderr, is damaged."""
        noted = self.folder / ENVIRONMENT
        try:
            return files.read_json(noted) if noted.exists() else {}
        except UserError as error:  # the page can do without
            errors.notice(f"left out: {error}")
            return {}

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The epochs' rows, without the untrained network's."""
        return [row for row in self.rows if row["epoch"]]

    @property
    def evaluated(self) -> dict[str, Any] | None:
        """The last row with an evaluation of a trained network."""
        return next((row for row in reversed(self.trained) if row.get("mAP") is not None), None)


def read_run(folder: Path) -> Recorded:
    """Reads a run's settings and figures.

    Raises:
        UserError: the folder holds no run, or one that has no figures yet.
    """
    from cge_fast.checkpoint import CONFIG  # which imports torch

    if not (folder / CONFIG).is_file():
        raise UserError(f"run: {folder} is not the folder of a run, it has no {CONFIG}")
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        raise UserError(f"run: {folder} has no figures in metrics.jsonl yet")
    return Recorded(folder, read_settings(folder / CONFIG), rows)


def environment(device: torch.device, ranks: int) -> dict[str, str]:
    """Where a run trains, by name."""
    import torch
    import torchvision

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    return {
        "device": name + (f", {ranks} processes" if ranks > 1 else ""),
        "CPU cores": str(len(os.sched_getaffinity(0))),
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
        "cge-fast": cge_fast.__version__,
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
    }


def series_of(rows: Sequence[Mapping[str, Any]], name: str, key: str) -> list[Series]:
    """The values of a figure over the epochs, one series for each number of a list; none where it is 0 throughout."""
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    if points and isinstance(points[0][1], list):
        several = zip(*(values for _, values in points), strict=False)
        epochs = [epoch for epoch, _ in points]
        return [
            Series(f"{name} {place}", list(zip(epochs, values, strict=True)))
            for place, values in enumerate(several, start=1)
        ]
    return [Series(name, points)] if any(value for _, value in points) else []


def curves(run: Recorded) -> str:
    """What metrics.jsonl has, over the epochs."""
    charts = []
    for title, (percent, names) in CURVES.items():
        series = [one for name, key in names.items() for one in series_of(run.rows, name, key)]
        charts += [chart(title, series, percent)] if series else []
    levels = series_of(run.trained, "", "num_stripes_correct")
    if levels:
        n = len(levels) - 1
        named = [Series(f"{correct} of {n} right", levels[correct].points) for correct in range(n, -1, -1)]
        charts.append(chart("Images by stripes that are right", named, percent=True, stacked=True))
    return f'<div class="grid-of">{"".join(charts)}</div>'


def figures(run: Recorded) -> dict[str, str]:
    """The main figures by name."""
    of = run.evaluated
    found = {name: f"{of[key]:.1%}" for name, key in FIGURES.items() if of.get(key) is not None} if of else {}
    seconds = sum(row.get("seconds") or 0 for row in run.trained)
    return found | {"epochs": f"{run.rows[-1]['epoch']}/{run.config.optim.epochs}", "training": duration(seconds)}


def duration(seconds: float) -> str:
    """In the unit that a person would take."""
    if seconds >= 1.5 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def settings(config: TrainConfig) -> dict[str, str]:
    """The settings as YAML by name, without the run's folder."""
    named = {name: value for name, value in flat(asdict(config)) if name not in (*SECTIONS, "output")}
    return {name: json.dumps(value, default=str).strip('"[]') for name, value in named.items()}


def html(run: Recorded, pictures: Mapping[str, str]) -> bytes:
    """The page about a run; `pictures` are HTML by heading."""
    config, defaults = run.config, settings(TrainConfig())
    kind = f"CGE, {config.model.stripes} stripes" if config.model.cge else "without CGE"
    untrained = next((row for row in run.rows if not row["epoch"] and None not in map(row.get, ("mAP", "rank1"))), None)
    floor = f"; untrained: {retrieval_text(untrained)}" if untrained else ""
    changed = [(name, value, defaults[name]) for name, value in settings(config).items() if value != defaults[name]]
    recipe = table(changed, ("setting", "here", "default")) if changed else "<p>All settings are the defaults.</p>"
    whole = f"<details><summary>All settings</summary><pre>{escape(to_yaml(config))}</pre></details>"
    where = table([(name, str(value)) for name, value in noted.items()]) if (noted := run.environment) else ""
    sections = {"": cards(figures(run)), "Training": curves(run), **pictures, "Settings": recipe + whole}
    subtitle = f"{config.data.name}, {config.model.backbone}, {kind}{floor}"
    return page(run.folder.resolve().name, subtitle, sections | {"Environment": where})


def write(folder: Path, pictures: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Writes the page; returns where.

    Raises:
        UserError: the folder holds no run, or one without figures.
    """
    files.replace(folder / REPORT, html(read_run(folder), pictures))
    return folder / REPORT


def pictures_of(opened: Callable[[], Trained]) -> dict[str, str]:
    """Ranked lists and saliency as HTML by heading; none, and a line on stderr, where they cannot be had."""
    try:
        from cge_fast.analyze.embedded import pictures

        return pictures(opened())
    except ModuleNotFoundError:
        why = f"they need matplotlib: {NEEDED}"
    except (UserError, OSError, RuntimeError) as error:  # the data set is elsewhere, say, or memory is short
        why = errors.one_line(error)
    errors.notice(f"{REPORT} is without pictures: {why}")
    return {}


def at_end(run: Run) -> None:
    """Writes the page about a training that is over, and says where; what fails is said, and is no error."""
    from cge_fast.analyze.trained import Trained

    folder = run.checkpoints.parent
    try:
        trained = Trained(run.checkpoints / "last", run.deployed.eval(), run.config, folder.name)
        path = write(folder, {} if run.result is None else pictures_of(lambda: trained))
        errors.notice(f"report: {path}")
    except (UserError, OSError) as error:
        errors.notice(f"{REPORT} is not written: {errors.one_line(error)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = program_parser(PROGRAM, f"Writes a page about a run, {REPORT} in its folder.", "RUN")
    parser.add_argument("run", type=Path, help="folder of the run")
    folder = parse_settings(parser, sys.argv[1:] if arguments is None else arguments).run
    read_run(folder)  # before the work that takes longer

    def opened() -> Trained:
        from cge_fast.analyze.trained import open_checkpoint

        return open_checkpoint(folder / "checkpoints" / "last")

    print(write(folder, pictures_of(opened)))


if __name__ == "__main__":
    errors.run(main, PROGRAM)

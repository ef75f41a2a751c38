"""The paper's figures, drawn from the trainings of seed 0."""

from collections.abc import Sequence
from pathlib import Path

from cge_fast.analyze.loss_cdf import loss_cdf
from cge_fast.analyze.saliency import saliency
from cge_fast.analyze.stripes import levels
from cge_fast.analyze.trained import open_checkpoint
from cge_fast.analyze.written import COLOURS, Written, plot, write
from cge_fast.errors import UserError, notice
from cge_fast.experiments.presets import Place
from cge_fast.experiments.runs import folder_of, last_row
from cge_fast.experiments.tables import TABLES
from cge_fast.log import read_rows

Runs = dict[str, Path]  # a training's folder by its row's name
ANALYSES = {"figure4": levels, "figure5a": loss_cdf, "figure7": saliency}
PAPERS = {"figure4": " (the paper: easiest 82.1% on Market-1501, 72.0% on MSMT17)"}
ACROSS_SETS = "figure4"  # one picture of all sets; the others are of one


def fits(key: str, place: Place) -> bool:
    """Whether the feature maps there have rows enough for one of the figure's trainings."""
    return bool(place.trained(TABLES[key].rows))


def require_fit(key: str, places: Sequence[Place]) -> None:
    """Says which sets a figure leaves out; UserError if it would leave out all."""
    lacking = [place for place in places if not fits(key, place)]
    what = ", ".join(f"{place.data}'s have {place.preset.rows}" for place in lacking)
    if lacking and len(lacking) == len(places):
        raise UserError(f"{key}: needs feature maps of more rows, {what}")
    if lacking:
        notice(f"{key}: left out where feature maps have too few rows, {what}")


def draw(key: str, places: Sequence[Place], output: Path) -> str:
    """Writes the figure's PNG and CSV to a folder; returns what they show in a line, and where they are."""
    runs = {
        place.data if key == ACROSS_SETS else row.name: folder_of(place.output, row, seed=0)
        for place in places
        for row in place.trained(TABLES[key].rows)
    }
    if key in ANALYSES:
        opened = [open_checkpoint(run / "checkpoints" / "last", label) for label, run in runs.items()]
        written = ANALYSES[key](opened, output)
    else:
        written = over_stripes(runs, output) if key == "figure5b" else over_epochs(runs, output)
    return f"{written.summary}{PAPERS.get(key, '')}\n{written.picture} and {written.table}"


def over_stripes(runs: Runs, output: Path) -> Written:
    """mAP of CGE over n, and as dashed lines of what has no stripes; over_stripes.png and .csv."""
    rows = [{"row": name, "mAP": last_row(run)["mAP"]} for name, run in runs.items()]
    points = [(int(row["row"].partition("n = ")[2]), 100 * row["mAP"]) for row in rows if "n = " in row["row"]]
    lines = [row for row in rows if "n = " not in row["row"]]
    figure, axes = plot("n, stripes", "mAP, %")
    axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[0], linewidth=2, label="CGE")
    for row, colour, line in zip(lines, COLOURS[1:], ("--", (0, (2, 2))), strict=False):
        axes.axhline(100 * row["mAP"], linestyle=line, color=colour, linewidth=2, label=row["row"])
    axes.set_xticks([n for n, _ in points])
    axes.legend()
    summary = "mAP: " + ", ".join(f"{row['row']} {row['mAP']:.1%}" for row in rows)
    return write(output, "over_stripes", figure, rows, summary)


def over_epochs(runs: Runs, output: Path) -> Written:
    """The training loss of one training over its epochs; over_epochs.png and .csv."""
    ((name, run),) = runs.items()
    rows = [{"epoch": row["epoch"], "loss": row["loss"]} for row in read_rows(run / "metrics.jsonl") if row["epoch"]]
    figure, axes = plot("epoch", "training loss")
    axes.plot(*zip(*(row.values() for row in rows), strict=True), ".-", color=COLOURS[0], linewidth=2, label=name)
    axes.locator_params(axis="x", integer=True)
    axes.legend()
    ends = f"from {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}"
    return write(output, "over_epochs", figure, rows, f"training loss of {name}: {ends}")

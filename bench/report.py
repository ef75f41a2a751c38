"""Everything that bench/ measures, as tables and pictures: python -m bench.report --help

Writes to --output: report.html, table.md and table.csv (each operator, direction and contender: time, spread, ratio to
this project, achieved bytes and FLOPs per second against what a large copy and a large matmul reach in the same run),
roofline.png, step.png (where the time of a training step goes) and scaling.png (time and memory over N and B).
Ctrl-C ends the measuring; what was measured until then is written.
"""

import csv
import html
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from bench import drawings, launches, machine, predict, scaling, train_step
from bench.cases import CASES, COMPILED, EAGER, OURS, Case, compare, default_device
from bench.ceilings import Ceilings, measure_ceilings
from bench.compiler import missing_compiler
from bench.gpus import GPUS
from bench.measure import Times
from bench.scaling import Point
from bench.shapes import DEFAULT, DTYPES, SHAPES, Shape, named
from bench.tables import table
from bench.work import Work, work
from cge_fast import errors
from cge_fast.errors import UserError

PROGRAM = "bench.report"
PICTURES = {
    "roofline.png": "Achieved FLOP/s over FLOPs per byte, beneath what a large matmul and a large copy reach",
    "step.png": "Where the time of a training step goes",
    "scaling.png": "Time and peak memory of the head's step, average pooling, over identities and over the batch",
}


@dataclass(frozen=True)
class Row:
    """One direction of one contender at one shape."""

    shape: str
    case: Case
    direction: str
    contender: str
    times: Times
    ours: float  # this project's median in the same run, seconds
    work: Work

    @property
    def bytes_per_second(self) -> float:
        """Compulsory bytes over the time."""
        return self.work.bytes / self.times.median

    @property
    def flops_per_second(self) -> float:
        """Needed FLOPs over the time."""
        return self.work.flops / self.times.median


@dataclass
class Results:
    """What has been measured so far."""

    machine: str
    notes: list[str] = field(default_factory=list)
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    steps: list[train_step.Row] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    launches: list[tuple[str, str, int, int, int]] = field(default_factory=list)
    predictions: list[tuple[str, str, str, str, str]] = field(default_factory=list)


def rows_of(name: str, shape: Shape, case: Case, found: dict[str, dict[str, Times]], itemsize: int) -> list[Row]:
    """Rows of one case at one shape."""
    needed = work(case.operator, shape, case.pooling or "average", itemsize)
    if "backward" in needed:
        needed["step"] = needed["forward"] + needed["backward"]
    return [
        Row(name, case, direction, contender, times, found[OURS][direction].median, needed[direction])
        for direction in found[OURS]
        for contender, times in ((contender, found[contender][direction]) for contender in found)
    ]


def count_launches(shape: Shape, dtype: str) -> list[tuple[str, int, int, int]]:
    """For each pooling: our own kernels in a step of the head, all kernels, and all of the eager reference."""
    found = []
    for pooling in launches.POOLINGS:
        own, beside = launches.count(shape, pooling, DTYPES[dtype], "fused")
        _, eager = launches.count(shape, pooling, DTYPES[dtype], "reference")
        found.append((pooling, own.total(), own.total() + beside.total(), eager.total()))
    return found


def measure(results: Results, shapes: dict[str, Shape], options: Namespace) -> None:
    """Fills the results, with a progress bar; what is there stays if it is interrupted."""
    device, dtype = default_device(), DTYPES[options.dtype]

    def ceilings() -> None:
        results.ceilings = measure_ceilings(device, dtype)

    def operators(name: str, case: Case) -> None:
        found = compare(case, shapes[name], dtype, options.rounds, options.seconds)
        results.rows += rows_of(name, shapes[name], case, found, dtype.itemsize)

    def sizes(name: str) -> None:
        for point in scaling.sweep(name, dtype, device, options.rounds, options.seconds):
            results.points.append(point)

    def training(name: str) -> None:
        results.steps += train_step.measure(name, train_step.SETTINGS[name], options.rounds)

    tasks = [("copy and matmul", ceilings)]
    tasks += [(f"{name}: {case}", partial(operators, name, case)) for name in shapes for case in CASES]
    tasks += [(f"the head's step over {name}", partial(sizes, name)) for name in scaling.SWEEPS]
    tasks += [(f"training step of {name}", partial(training, name)) for name in options.settings]
    with tqdm(tasks, unit=" part") as bar:
        for title, task in bar:
            bar.set_description(title)
            task()


def csv_rows(results: Results) -> list[dict[str, str | float]]:
    """table.csv: one row for each figure."""
    return [
        {
            "shape": row.shape,
            "operator": row.case.operator,
            "pooling": row.case.pooling or "",
            "direction": row.direction,
            "contender": row.contender,
            "median_ms": row.times.median * 1e3,
            "low_ms": row.times.percentiles[0] * 1e3,
            "high_ms": row.times.percentiles[1] * 1e3,
            "rounds": len(row.times.seconds),
            "times_ours": row.times.median / row.ours,
            "compulsory_bytes": row.work.bytes,
            "flops": row.work.flops,
            "copy_bytes_per_second": results.ceilings.bandwidth,
            "matmul_flops_per_second": results.ceilings.flops,
            "machine": results.machine,
        }
        for row in results.rows
    ]


def time_table(results: Results, shape: str) -> str:
    """Markdown: each operator and direction at a shape; ratios are to this project."""
    by_place: dict[tuple[Case, str], dict[str, Row]] = {}
    for row in results.rows:
        if row.shape == shape:
            by_place.setdefault((row.case, row.direction), {})[row.contender] = row
    others = [name for name in (EAGER, COMPILED) if any(name in rows for rows in by_place.values())]
    header = ["operator", "direction", f"{OURS}, ms"]
    header += [cell for name in others for cell in (f"{name}, ms", "ratio")] + ["GB/s", "GFLOP/s", "floor, ms"]
    lines = []
    for (case, direction), rows in by_place.items():
        ours = rows[OURS]
        line = [str(case), direction, milliseconds(ours.times)]
        for name in others:
            mark = max(ours.times.mark, rows[name].times.mark)
            line += [milliseconds(rows[name].times), f"{rows[name].times.median / ours.ours:.2f}x{mark}"]
        floor = results.ceilings.seconds(ours.work.bytes, ours.work.flops)
        rates = f"{ours.bytes_per_second / 1e9:.1f}", f"{ours.flops_per_second / 1e9:.1f}"
        lines.append((*line, *rates, f"{floor * 1e3:.2f}"))
    return table(header, lines, markdown=True)


def milliseconds(times: Times) -> str:
    """Median and 20th and 80th percentile."""
    low, high = times.percentiles
    return f"{times.median * 1e3:.2f}{times.mark} ({low * 1e3:.2f}, {high * 1e3:.2f})"


def scaling_table(points: list[Point]) -> str:
    """Markdown: the step's time and peak memory at each size, and the exponents with which they grow."""
    lines = []
    for sweep, contender in dict.fromkeys((point.sweep, point.contender) for point in points):
        mine = [point for point in points if (point.sweep, point.contender) == (sweep, contender)]
        for point in mine:
            line = (sweep, contender, f"{point.size:,}", milliseconds(point.times), f"{point.peak_bytes / 1e6:,.1f}")
            lines.append(line)
        if len(mine) > 1:
            lines.append((sweep, contender, "slope", *(f"{value:.2f}" for value in scaling.slopes(mine))))
    return table(("over", "contender", "size", "step, ms", "peak, MB"), lines, markdown=True)


def sections(results: Results) -> list[tuple[str, str]]:
    """Title and Markdown of each part of the report that has been measured."""
    found = []
    if results.ceilings:
        ceilings = results.ceilings
        text = (
            f"Copy {ceilings.bandwidth / 1e9:.1f} GB/s (read and written), matmul {ceilings.flops / 1e9:.0f} GFLOP/s."
        )
        found.append(("Ceilings", text))
    for shape in dict.fromkeys(row.shape for row in results.rows):
        found.append((f"{shape}: {SHAPES[shape]}", time_table(results, shape)))
    if results.launches:
        header = ("shape", "pooling", "our kernels", "all kernels", "reference, eager")
        found.append(("Kernel launches of the head's step", table(header, results.launches, markdown=True)))
    if results.steps:
        found.append(("Training step", train_step.report(results.steps, markdown=True)))
    if results.points:
        found.append(("Scaling of the head's step, average pooling", scaling_table(results.points)))
    if results.predictions:
        header = ("shape", "operator", "predicted, us", "measured, us", "measured / predicted")
        found.append(("Against the prediction", table(header, results.predictions, markdown=True)))
    return found


LEGEND = (
    "Median milliseconds (20th, 80th percentile) of contenders that take turns; ~ marks a spread above 20%. Ratios are "
    "to cge_kernels. GB/s and GFLOP/s: what cge_kernels must move and compute, over its time. Floor: the same at the "
    "ceilings, if moving and computing overlap; powers, divisions and exponentials are not in it."
)


def write(results: Results, output: Path) -> None:
    """All files of the report."""
    output.mkdir(parents=True, exist_ok=True)
    rows = csv_rows(results)
    if rows:
        with (output / "table.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    pictures = []
    if results.rows:
        drawings.roofline(results.rows, results.ceilings, results.machine, output / "roofline.png")
        pictures.append("roofline.png")
    if results.steps:
        drawings.step(results.steps, results.machine, output / "step.png")
        pictures.append("step.png")
    if results.points:
        drawings.scaling(results.points, results.machine, output / "scaling.png")
        pictures.append("scaling.png")
    heading = [results.machine, LEGEND, *results.notes]
    parts = [f"## {title}\n\n{text}" for title, text in sections(results)]
    (output / "table.md").write_text("\n\n".join(["# cge-fast: measured", *heading, *parts]) + "\n")
    (output / "report.html").write_text(page(heading, sections(results), pictures))


def page(heading: list[str], parts: list[tuple[str, str]], pictures: list[str]) -> str:
    """The report as one HTML page beside its pictures."""
    body = ["<h1>cge-fast: measured</h1>", *(f"<p>{html.escape(line)}</p>" for line in heading)]
    body += [
        f'<figure><img src="{name}" alt="{PICTURES[name]}"><figcaption>{PICTURES[name]}</figcaption></figure>'
        for name in pictures
    ]
    for title, text in parts:
        body += [f"<h2>{html.escape(title)}</h2>", as_html(text)]
    return PAGE.format(body="\n".join(body))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>cge-fast: measured</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: 0.15rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) {{ text-align: left }}
img {{ max-width: 100% }} figure {{ margin: 1.5rem 0 }} figcaption {{ color: #666 }}
</style></head><body>
{body}
</body></html>
"""


def as_html(markdown: str) -> str:
    """A table in Markdown as one in HTML, and any other line as a paragraph."""
    lines, found = markdown.splitlines(), []
    rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    if rows:
        first, _, *others = rows
        cells = ["".join(f"<th>{cell}</th>" for cell in first)]
        cells += ["".join(f"<td>{cell}</td>" for cell in row) for row in others]
        found.append("<table>" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
    return "\n".join(found + [f"<p>{html.escape(line)}</p>" for line in lines if line and line[0] != "|"])


# An operator's direction here, and what bench/predict.py calls it.
PREDICTED = {
    ("stripe_pool", "forward"): "pool forward",
    ("stripe_pool", "backward"): "pool backward",
    ("revised_cross_entropy", "forward"): "loss forward",
    ("revised_cross_entropy", "backward"): "loss backward",
    ("revise_logits", "forward"): "revise forward",
    ("revise_logits", "backward"): "revise backward",
    ("write_memory_", "forward"): "memory write",
}


def compare_with_prediction(rows: Sequence[Row], gpu: str, dtype: str) -> list[tuple[str, str, str, str, str]]:
    """Shape, operator, predicted and measured microseconds and their ratio, of the operators that are predicted."""

    @cache
    def predicted(shape: str, pooling: str) -> dict[str, float]:
        return {found.operator: found.predicted_us for found in predict.predict(gpu, shape, dtype, pooling)}

    found = []
    for row in rows:
        name = PREDICTED.get((row.case.operator, row.direction))
        if name and row.contender == OURS:
            expected, measured = predicted(row.shape, row.case.pooling or "gem")[name], row.times.median * 1e6
            cells = f"{expected:.1f}", f"{measured:.1f}", f"{measured / expected:.2f}"
            found.append((row.shape, f"{row.case}, {row.direction}", *cells))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Measures every operator, the head and the training step against cge_reference and writes tables "
        "and pictures. With all shapes it takes about three quarters of an hour on two CPU cores.",
        exit_on_error=False,
    )
    names = ", ".join(SHAPES)
    parser.add_argument("--shapes", nargs="+", type=str, default=DEFAULT, help=f"of {names}; default all but tiny")
    parser.add_argument("--output", type=Path, help="folder of the report; default runs/bench-<date>-<time>")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of feature map and memory")
    parser.add_argument("--rounds", type=PositiveInt, default=15, help="turns of each contender, at most")
    parser.add_argument("--seconds", type=PositiveFloat, default=20.0, help="for each operator and shape, about")
    parser.add_argument(
        "--settings", nargs="*", choices=list(train_step.SETTINGS), default=["resnet18"], help="training steps, or none"
    )
    parser.add_argument("--against-prediction", choices=list(GPUS), help="the GPU here, beside what it should do")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    shapes = named(options.shapes)
    if options.against_prediction and default_device().type != "cuda":
        raise UserError("against-prediction: compares the times of a GPU, and there is none here")
    output = options.output or Path("runs") / datetime.now().strftime("bench-%Y%m%d-%H%M%S")
    results = Results(machine.description(default_device()))
    if missing_compiler():
        results.notes.append(f"torch.compile is left out, it cannot run here: {missing_compiler()}")
        print(results.notes[-1], file=sys.stderr)
    try:
        for name, shape in shapes.items():
            results.launches += [(name, *counts) for counts in count_launches(shape, options.dtype)]
        measure(results, shapes, options)
        if options.against_prediction:
            results.predictions = compare_with_prediction(results.rows, options.against_prediction, options.dtype)
    except KeyboardInterrupt:
        results.notes.append("Interrupted: this is what had been measured.")
        raise
    finally:
        write(results, output)
        print(f"report: {output / 'report.html'}")


if __name__ == "__main__":
    errors.run(main, PROGRAM)

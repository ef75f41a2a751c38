"""Tables in Markdown of the figures in a results file: what the program prints and what the documentation quotes."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench.results import Figure, read

PREFIXES = {
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6},
    "B": {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1},
    "B/s": {"GB/s": 1e9},
    "FLOP": {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "kFLOP": 1e3},
    "FLOP/s": {"GFLOP/s": 1e9},
}
BASELINES = "cge_kernels", "cge_fast"  # a ratio is to one of these
COMPARED = "eager", "torch.compile", "NumPy"
BY_SETTING = (
    "operators",
    "host",
    "launches",
    "traffic",
    "bytes of tensors",
    "predict",
    "predicted kernels",
)  # one table for each
BY_QUANTITY = "bytes of tensors", "predicted kernels", "sharding"  # quantities, not contenders, side by side
BRIEF = "steps", "head"  # without percentiles


def tables(file: Path) -> dict[str, str]:
    """Each table of a results file, in Markdown, by its name."""
    return {name: table(figures, name) for name, figures in views(read(file)).items()}


def document(figures: Iterable[Figure]) -> str:
    """All tables with their names, and beneath each where its figures come from."""
    parts = []
    for name, chosen in views(figures).items():
        origins = dict.fromkeys(figure.origin for figure in chosen)
        parts.append("\n\n".join([f"## {name}", table(chosen, name), *filter(None, origins)]))
    return "\n\n".join(parts)


def views(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """The figures of each table by its name: of each bench, or of each of its settings, and of steps alone.

    A prediction also stands beside what was measured on the GPU that it is for.
    """
    found: dict[str, list[Figure]] = defaultdict(list)
    predicted = []
    for figure in figures:
        found[f"{figure.bench}, {figure.setting}" if figure.bench in BY_SETTING else figure.bench].append(figure)
        if figure.bench == "predict":
            predicted.append(figure)
        if figure.bench == "operators" and figure.subject == "write_memory_" and figure.quantity == "forward":
            found[f"steps, {figure.setting}"].append(replace(figure, quantity="step"))  # it has no backward
        if figure.bench == "operators" and figure.quantity == "step":
            found[f"steps, {figure.setting}"].append(figure)
            if figure.subject.startswith("head"):
                found["head"].append(figure)
    for figure in predicted:
        measured = found.get(f"operators, {figure.setting}", ())
        if any(figure.contender.split()[0] in other.origin for other in measured):
            found[f"operators, {figure.setting}"].append(figure)
    return dict(found)


def table(figures: Sequence[Figure], name: str) -> str:
    """The figures with what they are of at the left; what is the same for all of them is left out."""
    units = {
        unit: chosen_unit(unit, [f.value for f in figures if f.unit == unit]) for unit in {f.unit for f in figures}
    }
    across = "quantity" if figures[0].bench in BY_QUANTITY else "contender"
    labels = [
        vars(figure) | {"quantity": ", ".join(filter(None, (figure.quantity, units[figure.unit][0])))}
        for figure in figures
    ]
    fields = [field for field in ("setting", "subject", "quantity", "contender") if field != across]
    keys = [field for field in fields if len({label[field] for label in labels}) > 1] or ["subject"]
    rows: dict[tuple[str, ...], dict[str, Figure]] = defaultdict(dict)
    for label, figure in zip(labels, figures, strict=True):
        rows[tuple(label[key] for key in keys)][label[across]] = figure
    columns = list(dict.fromkeys(label[across] for label in labels))
    baseline = next((column for column in columns if column in BASELINES), None)
    header = (
        keys if across == "quantity" or "quantity" in keys else [*keys[:-1], f"{keys[-1]}: {labels[0]['quantity']}"]
    )
    for column in columns:
        header = [*header, column, *(["ratio"] if baseline and column in COMPARED else [])]
    lines = []
    for row, by_column in rows.items():
        line = list(row)
        for column in columns:
            figure = by_column.get(column)
            line.append(cell(figure, units[figure.unit][1], not name.startswith(BRIEF)) if figure else "")
            if baseline and column in COMPARED:
                line.append(ratio(figure, by_column.get(baseline)))
        lines.append(line)
    return markdown(header, lines, len(keys))


def chosen_unit(unit: str, values: list[float]) -> tuple[str, float]:
    """The unit with a prefix that suits the values' median, and how much it is."""
    scales = PREFIXES.get(unit, {unit: 1})
    return next(((name, scale) for name, scale in scales.items() if scale <= median(values)), list(scales.items())[-1])


def cell(figure: Figure, scale: float, with_percentiles: bool) -> str:
    """The value, marked if it is uncertain, and its percentiles."""
    text = number(figure.value / scale) + figure.mark
    if with_percentiles and figure.low is not None:
        text += f" ({number(figure.low / scale)}, {number(figure.high / scale)})"
    return text


def number(value: float) -> str:
    """With three digits at least, thousands apart."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def ratio(figure: Figure | None, baseline: Figure | None) -> str:
    """How many times better the baseline is; of shares in percent there is none."""
    if figure is None or baseline is None or figure.unit == "%" or not figure.value or not baseline.value:
        return ""
    better = baseline.value / figure.value if figure.unit.endswith("/s") else figure.value / baseline.value
    return f"{better:.2f}x{max(figure.mark, baseline.mark)}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """A table whose first columns, so many, are texts and the others numbers, which stand at the right."""
    align = [str.ljust if column < texts else str.rjust for column in range(len(header))]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width if column < texts else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [[place(*cell) for place, *cell in zip(align, row, widths, strict=True)] for row in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))

"""Tables in Markdown of the figures in a results file: what the program prints and what the documentation quotes."""

from collections import defaultdict
from collections.abc import Sequence
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
BY_QUANTITY = "bytes of tensors", "predicted kernels", "sharding"  # quantities, not contenders, side by side
BY_SETTING = "operators", "launches", "launches by name", "traffic", "predict", *BY_QUANTITY  # a table for each setting
BRIEF = "steps", "head"  # without percentiles


def tables(file: Path) -> dict[str, str]:
    """Each table of a results file, in Markdown, by its name."""
    return {name: table(figures, name) for name, figures in views(read(file)).items()}


def document(figures: Sequence[Figure]) -> str:
    """All tables with their names, and beneath each where its figures come from."""
    parts = []
    for name, chosen in views(figures).items():
        origins = dict.fromkeys(figure.origin for figure in chosen)
        parts.append("\n\n".join([f"## {name}", table(chosen, name), *filter(None, origins)]))
    return "\n\n".join(parts)


def views(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """The figures of each table by its name: of each bench, or of each of its settings, and of whole steps alone.

    A prediction also stands beside what was measured on the GPU that it is for.
    """
    found: dict[str, list[Figure]] = defaultdict(list)
    for figure in figures:
        found[f"{figure.bench}, {figure.setting}" if figure.bench in BY_SETTING else figure.bench].append(figure)
        if figure.bench == "traffic" and figure.subject.startswith("step"):
            found["traffic of a step"].append(figure)
        if figure.bench == "operators":
            if figure.subject == "write_memory_" and figure.quantity == "forward":  # it has no backward
                found[f"steps, {figure.setting}"].append(replace(figure, quantity="step"))
            if figure.quantity == "step":
                found[f"steps, {figure.setting}"].append(figure)
            if figure.quantity == "step" and figure.subject.startswith("head"):
                found["head"].append(figure)
    for figure in [figure for figure in figures if (figure.bench, figure.contender) == ("predict", "predicted")]:
        setting, _, gpu = figure.setting.rpartition(", ")
        measured = found.get(f"operators, {setting}", [])
        if any(gpu.split()[0] in other.origin for other in measured):
            measured.append(replace(figure, setting=setting, contender=f"{gpu}, predicted"))
    return dict(found)


def table(figures: Sequence[Figure], name: str) -> str:
    """The figures with what they are of at the left; what is the same for all of them is left out."""
    figures = with_prefixes(figures)
    across = "quantity" if figures[0].bench in BY_QUANTITY else "contender"
    labels = [
        vars(figure) | {"quantity": figure.quantity + (f", {figure.unit}" if figure.unit else "")} for figure in figures
    ]
    fields = [field for field in ("setting", "subject", "quantity", "contender") if field != across]
    keys = [field for field in fields if len({label[field] for label in labels}) > 1] or ["subject"]
    rows: dict[tuple[str, ...], dict[str, Figure]] = defaultdict(dict)
    for label, figure in zip(labels, figures, strict=True):
        rows[tuple(label[key] for key in keys)][label[across]] = figure
    columns = list(dict.fromkeys(label[across] for label in labels))
    baseline = next((column for column in columns if column in BASELINES), None)
    compared = [column for column in columns if baseline and column in COMPARED]
    header = list(keys) if "quantity" in (across, *keys) else [*keys[:-1], f"{keys[-1]}: {labels[0]['quantity']}"]
    for column in columns:
        header += [column, "ratio"] if column in compared else [column]
    lines = []
    for row, by_column in rows.items():
        line = list(row)
        for column in columns:
            figure = by_column.get(column)
            line.append(cell(figure, with_percentiles=not name.startswith(BRIEF)) if figure else "")
            if column in compared:
                line.append(ratio(figure, by_column.get(baseline)))
        lines.append(line)
    return markdown(header, lines, len(keys))


def with_prefixes(figures: Sequence[Figure]) -> list[Figure]:
    """The figures in units whose prefixes suit the median of all values of a unit."""
    values = defaultdict(list)
    for figure in figures:
        values[figure.unit].append(figure.value)
    chosen = {}
    for unit, found in values.items():
        scales = PREFIXES.get(unit, {unit: 1})
        chosen[unit] = next((pair for pair in scales.items() if pair[1] <= median(found)), list(scales.items())[-1])

    def scaled(figure: Figure) -> Figure:
        unit, scale = chosen[figure.unit]
        numbers = {"value": figure.value, "low": figure.low, "high": figure.high}
        return replace(figure, unit=unit, **{name: n if n is None else n / scale for name, n in numbers.items()})

    return [scaled(figure) for figure in figures]


def cell(figure: Figure, with_percentiles: bool) -> str:
    """The value, marked if it is uncertain, and its percentiles."""
    text = number(figure.value) + figure.mark
    has_percentiles = with_percentiles and figure.low is not None
    return f"{text} ({number(figure.low)}, {number(figure.high)})" if has_percentiles else text


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

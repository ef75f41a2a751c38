"""Figures, the results file that keeps them, and the tables that are made of it.

The file is a CSV with a row for each figure, which says where, with which versions and when it was found. The program
prints the tables, and a page quotes one below a line `<!-- bench/results.csv: NAME -->`.
"""

import csv
import math
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Self

import torch

from cge_fast.errors import UserError
from cge_kernels.common.device_functions import triton

CPU_INFO = Path("/proc/cpuinfo")
UNCERTAIN = 0.2  # spread over the value from which on a figure is marked
PREFIXES = {-3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}
BASELINES = "cge_kernels", "cge_fast"  # a ratio is to one of these
COMPARED = "eager", "torch.compile", "NumPy", "reference", "torchvision"
SUMMARY = {  # README's table: bench, setting, subject and quantity by what they are called there
    "head's training step, GeM": ("operators, step", "msmt17, float32", "head, gem", "step"),
    "head's training step, average": ("operators, step", "msmt17, float32", "head, average", "step"),
    "extra memory of the loss": (
        *("loss, extra memory", "B 256, C 512, n 3, float32, scratch 256 MiB", "N 200,000", "extra memory"),
    ),
    "kernels launched on a GPU, GeM (counted)": ("launches", "msmt17, bfloat16, sm_90", "head, gem", "all kernels"),
    "bytes moved on a GPU, GeM (counted)": ("traffic", "msmt17, bfloat16, sm_90", "head, gem, step", "moved"),
}


@dataclass(frozen=True)
class Figure:
    """One number that was measured, counted or computed.

    bench: the table that it belongs to. setting: sizes and dtype. subject: what it is about, an operator say.
    contender: whose it is. quantity: what it is, "backward" say. value, in `unit` without prefix: "s", "B", "". low and
    high: the 20th and 80th percentile of a median. The rest says where, with what and when it was found.
    """

    bench: str
    setting: str
    subject: str
    contender: str
    quantity: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    machine: str = ""
    versions: str = ""
    commit: str = ""
    time: str = ""

    @classmethod
    def median(cls, *names: str, samples: Sequence[float]) -> Self:
        """The median of the samples, with its percentiles; names: the first six fields."""
        percentiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(percentiles).tolist()
        return cls(*names, middle, low, high)

    @property
    def mark(self) -> str:
        """ "~" behind a figure whose percentiles lie more than a fifth of it apart."""
        return "~" if self.low is not None and self.high - self.low > UNCERTAIN * self.value else ""

    def __str__(self) -> str:
        power = 0
        if self.value and self.unit in ("s", "B", "B/s", "FLOP", "FLOP/s"):
            power = min(4, max(-3, math.floor(math.log10(abs(self.value)) / 3)))
        value = self.value / 1000**power
        is_long = value == int(value) or abs(value) >= 100
        number = f"{value:,.0f}" if is_long else f"{value:.3g}"
        return f"{number}{self.mark} {PREFIXES[power]}{self.unit}".strip()


COLUMNS = [field.name for field in fields(Figure)]


def append(figures: Iterable[Figure], file: Path | None) -> Iterator[Figure]:
    """Hands the figures on with their origin, each written to the file first, if there is one.

    So what was found survives an interruption.
    """
    found_here = origin()
    is_new = file is not None and not file.exists()
    with Path(file or os.devnull).open("a", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for figure in figures:
            figure = replace(figure, **found_here)
            writer.writerow(asdict(figure))
            opened.flush()
            yield figure


def read(file: Path) -> list[Figure]:
    """The figures of the file; of each bench, setting and subject those of the last run.

    Raises:
        UserError: the file has other columns.
    """
    with file.open(newline="") as opened:
        reader = csv.DictReader(opened)
        if reader.fieldnames != COLUMNS:
            raise UserError(f"csv: {file} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
        rows = list(reader)
    last = {(row["bench"], row["setting"], row["subject"]): row["time"] for row in rows}
    return [
        Figure(**row | {name: float(row[name]) if row[name] else None for name in ("value", "low", "high")})
        for row in rows
        if row["time"] == last[row["bench"], row["setting"], row["subject"]]
    ]


def origin() -> dict[str, str]:
    """Machine, versions, commit and time of a figure that is found now."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if triton is not None:
        versions += f", triton {triton.__version__}"
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return {"machine": processor(), "versions": versions, "commit": commit(), "time": now}


def processor() -> str:
    """The GPU's name, or the CPU's with its vector instructions, cores and torch's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    instructions = torch.backends.cpu.get_cpu_capability()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{model or platform.machine()} ({instructions}), {threads}"


def commit() -> str:
    """The checkout's commit, with "+" if its files differ from it; "unknown" outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def by_table(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """The figures of each bench by its name, and as "summary" those that `SUMMARY` names."""
    labels = {place: label for label, place in SUMMARY.items()}
    found: dict[str, list[Figure]] = defaultdict(list)
    for figure in figures:
        found[figure.bench].append(figure)
        label = labels.get((figure.bench, figure.setting, figure.subject, figure.quantity))
        if label and figure.contender in (*BASELINES, *COMPARED):
            found["summary"].append(replace(figure, setting="", subject=label, quantity=""))
    return found


def document(figures: Sequence[Figure]) -> str:
    """All tables with their names, and beneath each where its figures come from."""
    parts = []
    for name, chosen in by_table(figures).items():
        origins = dict.fromkeys(f"{one.machine}; {one.versions}; {one.commit}; {one.time}" for one in chosen)
        parts += [f"## {name}", table(chosen), *origins]
    return "\n\n".join(parts)


def table(figures: Sequence[Figure]) -> str:
    """Contenders side by side, or the quantities of a single one; rows say what differs between figures."""
    across = "contender" if len({figure.contender for figure in figures}) > 1 else "quantity"
    names = [name for name in ("setting", "subject", "quantity") if name != across]
    keys = [name for name in names if len({getattr(figure, name) for figure in figures}) > 1] or ["subject"]
    rows: dict[tuple[str, ...], dict[str, Figure]] = defaultdict(dict)
    for figure in figures:
        rows[tuple(getattr(figure, key) for key in keys)][getattr(figure, across)] = figure
    columns = list(dict.fromkeys(getattr(figure, across) for figure in figures))
    baseline = next((column for column in columns if column in BASELINES), None)
    lines = [list(keys)]
    for column in columns:
        lines[0] += [column, "ratio"] if baseline and column in COMPARED else [column]
    for row, cells in rows.items():
        line = list(row)
        for column in columns:
            line.append(str(cells.get(column, "")))
            if baseline and column in COMPARED:
                line.append(ratio(cells.get(column), cells.get(baseline)))
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = len(keys)  # numbers, behind them, stand at the right
    lines.insert(1, ["-" * w if i < texts else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    padded = [[f"{cell:{'<' if i < texts else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def ratio(figure: Figure | None, baseline: Figure | None) -> str:
    """How many times better the baseline is; of shares in percent there is none."""
    if figure is None or baseline is None or figure.unit == "%" or not figure.value or not baseline.value:
        return ""
    better = baseline.value / figure.value if figure.unit.endswith("/s") else figure.value / baseline.value
    return f"{better:.2f}x{max(figure.mark, baseline.mark)}"

"""The results file: a CSV with a row for each figure, which says where, with which versions and when it was found."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from cge_fast.errors import UserError
from cge_kernels.common.device_functions import triton

CPU_INFO = Path("/proc/cpuinfo")
UNCERTAIN = 0.2  # spread over the value from which on a figure is marked
ORIGIN = ("machine", "versions", "commit", "time")


@dataclass(frozen=True)
class Figure:
    """One number that was measured, counted or computed.

    bench: the command that found it. setting: sizes and dtype. subject: what it is about, an operator say. contender:
    whose it is. quantity: what it is, "backward" say. value, in `unit` without prefix: "s", "B", "". low and high: the
    20th and 80th percentile of a median. origin: machine, versions, commit and time.
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
    origin: str = ""

    @classmethod
    def median(cls, *names: str, samples: Sequence[float]) -> "Figure":
        """The median of the samples, with its percentiles; names: the first six fields."""
        low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
        return cls(*names, middle, low, high)

    @property
    def mark(self) -> str:
        """ "~" behind a figure whose percentiles lie more than a fifth of it apart."""
        return "~" if self.low is not None and self.high - self.low > UNCERTAIN * self.value else ""


COLUMNS = [field.name for field in fields(Figure) if field.name != "origin"] + list(ORIGIN)


def append(figures: Iterable[Figure], file: Path | None) -> Iterator[Figure]:
    """Hands the figures on with their origin, each written to the file first, if there is one.

    So what was found survives an interruption.
    """
    found_here = origin()
    is_new = file is not None and not file.exists()
    with Path(file or os.devnull).open("a", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if is_new:
            writer.writeheader()
        for figure in figures:
            writer.writerow(asdict(figure) | found_here)
            opened.flush()
            yield replace(figure, origin="; ".join(found_here.values()))


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
    found = []
    for row in rows:
        if row["time"] == last[row["bench"], row["setting"], row["subject"]]:
            said = {name: row[name] for name in COLUMNS[:6]}
            numbers = {name: float(row[name]) if row[name] else None for name in ("value", "low", "high")}
            found.append(Figure(**said, **numbers, origin="; ".join(row[name] for name in ORIGIN)))
    return found


def origin() -> dict[str, str]:
    """The last columns: machine, versions, commit and time."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if triton is not None:
        versions += f", triton {triton.__version__}"
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return dict(zip(ORIGIN, (processor(), versions, commit(), now), strict=True))


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

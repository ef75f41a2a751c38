"""A run's figures: metrics.jsonl (one object per epoch) and TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cge_fast.errors import UserError


class Log:
    """Appends rows to metrics.jsonl and to TensorBoard's events in a run's folder.

    Args:
        folder: the run's folder; it is made if need be.
        epochs_done: rows of later epochs, left by a run that was killed before its checkpoint, are dropped.
    """

    def __init__(self, folder: Path, epochs_done: int | None):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        rows = read_rows(self.file) if epochs_done is not None else []
        kept = [row for row in rows if row["epoch"] <= epochs_done]
        replacement = self.file.with_suffix(".unfinished")
        replacement.write_text("".join(json.dumps(row) + "\n" for row in kept))
        replacement.replace(self.file)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=(epochs_done or 0) + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Writes one epoch; numbers and lists of numbers become TensorBoard scalars, None is left out there."""
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in row.items():
            if name != "epoch":
                several = isinstance(value, list)
                for number, scalar in enumerate(value if several else [value]):
                    if scalar is not None:
                        self.board.add_scalar(f"{name}/{number}" if several else name, scalar, row["epoch"])
        self.board.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self.board.close()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a last line cut short by a kill is left out. Empty without the file.

    Raises:
        UserError: a line is not an epoch's row.
    """
    if not file.exists():
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                rows.append(json.loads(line))
                rows[-1]["epoch"] += 0
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file}, line {number}: must be an object with the number of an epoch") from error
    return rows

"""A run's figures: metrics.jsonl (one object per epoch) and TensorBoard."""

import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from cge_fast import files
from cge_fast.errors import UserError


class Log:
    """Appends rows to metrics.jsonl and to TensorBoard's events in a run's folder.

    Args:
        folder: the run's folder; it is made if need be.
        epochs_done: rows of later epochs, left by a run that was killed before its checkpoint, are dropped; None begins
            anew.
        last: the row of the last epoch that is done, as its checkpoint has it; the file's may have been cut short.
    """

    def __init__(self, folder: Path, epochs_done: int | None, last: dict[str, Any] | None = None):
        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        rows = read_rows(self.file) if epochs_done is not None else []
        kept = [row for row in rows if row["epoch"] <= epochs_done]
        if len(kept) < len(rows):
            print(f"{self.file}: dropped {len(rows) - len(kept)} rows after epoch {epochs_done}", file=sys.stderr)
        if last:
            kept = [row for row in kept if row["epoch"] < last["epoch"]] + [last]
        files.replace(self.file, "".join(json.dumps(row) + "\n" for row in kept).encode())
        # Not torch's SummaryWriter, whose thread prints a traceback when the disk is full.
        events = folder / "tensorboard" / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.events = events.open("xb")
        self.event(file_version="brain.Event:2")
        self.event(step=(epochs_done or 0) + 1, session_log=SessionLog(status=SessionLog.START))

    def event(self, **content: Any) -> None:
        """Writes a record of TensorBoard's."""
        RecordWriter(self.events).write(Event(wall_time=time.time(), **content).SerializeToString())

    def write(self, row: dict[str, Any]) -> None:
        """Writes one epoch; numbers and lists of numbers become TensorBoard scalars, None is left out there.

        Raises:
            OSError: the disk is full, or the like.
        """
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            for name, value in scalars(row).items():
                self.event(step=row["epoch"], summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
            self.events.flush()
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(self.file.parent)) from error

    def close(self) -> None:
        """Closes; what a full disk has not taken is lost, and `write` has said so."""
        with suppress(OSError):
            self.events.close()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The figures of an epoch by name; those of a list are called name/0, name/1, ..."""
    named: dict[str, Any] = {}
    for name, value in row.items():
        if value is not None and name != "epoch":
            named |= {f"{name}/{at}": one for at, one in enumerate(value)} if isinstance(value, list) else {name: value}
    return named


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
                row = json.loads(line)
                rows.append(row)
                if not math.isfinite(sum(scalars(row).values(), row["epoch"])):  # fails too where one is no number
                    raise ValueError("not finite")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                wanted = "must be an object with the number of an epoch and its figures"
                raise UserError(f"{file}, line {number}: {wanted}") from error
    return rows


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """What the console says of an epoch."""
    text = (
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}: loss {row['loss']:.3f}, "
        f"accuracy {row['train_accuracy']:.1%}, rate {row['lr']:.2g}, {row['seconds']:.1f} s"
    )
    return text if row["mAP"] is None else f"{text}; {retrieval_text(row)}"


def retrieval_text(row: Mapping[str, Any]) -> str:
    """mAP and rank-1."""
    return f"mAP {row['mAP']:.1%}, rank-1 {row['rank1']:.1%}"

"""One training of an experiment: where it lies, how it is run and what it measured."""

import json
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from cge_fast import checkpoint, files, train
from cge_fast.analyze.stripes import train_stripe_correct
from cge_fast.analyze.trained import open_checkpoint
from cge_fast.cli import read_settings
from cge_fast.errors import UserError, one_line
from cge_fast.experiments import variants
from cge_fast.experiments.tables import SCALE, Row
from cge_fast.log import read_rows
from cge_fast.loop import holds_run
from cge_fast.progress import progress

FINISHED, PRINTED, PRECISION = "finished.json", "printed.txt", "precision.json"


def settings_of(options: str) -> list[str]:
    """Options like "--a 1 --b 2", each without its dashes, in an order that does not depend on theirs."""
    return sorted(options.removeprefix("--").split(" --"))


def folder_of(output: Path, row: Row, seed: int) -> Path:
    """Where one seed of a row lies; rows of several tables with the same options share it."""
    settings = settings_of(row.options if row.scaled_by is None else f"{row.options} {SCALE} mean-w")
    name = "+".join(setting.replace(" ", "=", 1) for setting in settings)
    return output / "runs" / name.replace("/", "_") / f"seed-{seed}"


def is_whole(folder: Path) -> bool:
    """Whether a training there came to its end."""
    return (folder / FINISHED).exists()


def last_row(folder: Path) -> dict[str, float]:
    """The last epoch's figures."""
    return read_rows(folder / "metrics.jsonl")[-1]


def mean_weight(folder: Path) -> float:
    """Mean over the epochs of the revision's mean weight in a CGE training."""
    return statistics.mean(row["mean_weight"] for row in read_rows(folder / "metrics.jsonl") if row["epoch"])


def precision(folder: Path) -> list[float]:
    """Of each M_i of a trained CGE model, on the training images as evaluation sees them; measured once."""
    file = folder / PRECISION
    if not file.exists():
        correct = train_stripe_correct(open_checkpoint(folder / "checkpoints" / "last"))
        files.replace(file, json.dumps(correct.double().mean(dim=0).tolist()).encode())
    return json.loads(file.read_text())


def seconds(folder: Path) -> float:
    """How long a training took."""
    return files.read_json(folder / FINISHED)["seconds"]


def require_same(folder: Path, is_same: bool) -> None:
    """Raises UserError if the training there is another one."""
    if not is_same:
        raise UserError(f"{folder} holds a training with other settings, choose another --output")


def run(folder: Path, arguments: Sequence[str]) -> None:
    """Trains in this process what is left of a run, and notes the seconds that it took; what it prints goes to a file.

    Raises:
        UserError: the training failed, or the folder's run has other settings.
    """
    command = [*arguments, "--output", str(folder)]
    before = 0.0
    if holds_run(folder):
        require_same(folder, read_settings(folder / checkpoint.CONFIG) == train.parse(command)[0])
        before = sum(row["seconds"] for row in read_rows(folder / "metrics.jsonl") if row["epoch"])
        command.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / PRINTED).open("w") as printed, redirect_stdout(printed), redirect_stderr(printed):
        variants.main(command)
    finished = {"seconds": before + time.perf_counter() - start, "arguments": list(arguments)}
    files.replace(folder / FINISHED, json.dumps(finished).encode())


def run_rows(
    output: Path, rows: Sequence[Row], seeds: int, common: Sequence[str], jobs: int
) -> dict[tuple[str, int], str]:
    """Trains the rows that are missing, each once whatever number of rows share it.

    Args:
        output: the runs lie below it.
        rows: what to train; those that take the mean weight of a CGE training come after it.
        seeds: 0, 1, ... of each row.
        common: command line of every training.
        jobs: processes, which share the processor's cores.

    Returns:
        messages of the trainings that failed, by row's name and seed.
    """
    stages = [[row for row in rows if (row.scaled_by is None) == first] for first in (True, False)]
    folders = {folder_of(output, row, seed) for row, seed in product(rows, range(seeds))}
    failures: dict[Path, str] = {}
    with (
        executor(jobs) as map_unordered,
        progress(what="training", unit="runs", total=len(folders), initial=sum(map(is_whole, folders))) as bar,
    ):
        for stage in stages:
            missing = {}
            for seed, row in product(range(seeds), stage):
                folder, arguments = folder_of(output, row, seed), arguments_of(output, row, seed, common)
                if arguments is None:
                    failures[folder] = "the training that it takes the mean weight of failed"
                elif is_whole(folder):
                    require_same(folder, files.read_json(folder / FINISHED)["arguments"] == arguments)
                else:
                    missing[folder] = arguments
            for folder, failure in map_unordered(run_or_fail, missing.items()):
                if failure:
                    failures[folder] = failure
                bar.update()
    named = {(row.name, seed): failures.get(folder_of(output, row, seed)) for row, seed in product(rows, range(seeds))}
    return {key: failure for key, failure in named.items() if failure}


def arguments_of(output: Path, row: Row, seed: int, common: Sequence[str]) -> list[str] | None:
    """The command line of one seed of a row; None if it takes the mean weight of a training that is not whole."""
    own = " ".join(f"--{setting}" for setting in settings_of(row.options)).split()
    arguments = [*common, *own, "--seed", str(seed)]
    if row.scaled_by is None:
        return arguments
    source = folder_of(output, Row(row.name, row.scaled_by), seed)
    return [*arguments, SCALE, f"{mean_weight(source):.4f}"] if is_whole(source) else None


def run_or_fail(folder_and_arguments: tuple[Path, Sequence[str]]) -> tuple[Path, str | None]:
    """`run`; the folder, and the message if it failed."""
    folder, arguments = folder_and_arguments
    try:
        run(folder, arguments)
    except UserError as error:
        return folder, one_line(error)
    except (RuntimeError, OSError) as error:  # memory or disk: the other trainings may fare better
        with (folder / PRINTED).open("a") as printed:
            traceback.print_exc(file=printed)
        return folder, f"{type(error).__name__}: {one_line(error)}, see {folder / PRINTED}"
    return folder, None


@contextmanager
def executor(jobs: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Gives a `map` that yields results as they come, from `jobs` processes; one job runs in this process."""
    if jobs == 1:
        yield map
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with get_context("spawn").Pool(jobs, prepare_worker, (threads,)) as pool:  # leaving ends the processes
        yield pool.imap_unordered


def prepare_worker(threads: int) -> None:
    """Sets a process's threads. Its bars get a lock of its own: a killed process would leave tqdm's behind."""
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())

"""One training of an experiment: where it lies, how it is run and what it measured."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from cge_fast import checkpoint, train
from cge_fast.config import read_settings
from cge_fast.errors import UserError, one_line
from cge_fast.experiments.tables import Row
from cge_fast.log import read_rows
from cge_fast.training import holds_run

FINISHED, PRINTED = "finished.json", "printed.txt"


def run_folder(output: Path, options: Sequence[str], scaled: bool, seed: int) -> Path:
    """Where the training with a row's options lies; rows of several tables with the same options share it.

    scaled: whether its logits are scaled by another training's mean weight.
    """
    settings = sorted(f"{key.removeprefix('--')}={value}" for key, value in zip(options[::2], options[1::2], strict=True))
    name = "+".join([*settings, *(["model.logit_scale=mean-w"] if scaled else [])]).replace("/", "_")
    return output / "runs" / name / f"seed-{seed}"


def folder_of(output: Path, row: Row, seed: int) -> Path:
    """Where one seed of a row lies."""
    return run_folder(output, row.options, row.scaled_by is not None, seed)


def is_whole(folder: Path) -> bool:
    """Whether a training there came to its end."""
    return (folder / FINISHED).exists()


def require_same(folder: Path, arguments: Sequence[str]) -> None:
    """Raises UserError if the whole training there had another command line."""
    if json.loads((folder / FINISHED).read_text())["arguments"] != list(arguments):
        raise UserError(f"{folder} holds a training with other settings, choose another --output")


def run(folder: Path, arguments: Sequence[str]) -> None:
    """Trains in this process what is left of a run, and notes the seconds that it took; what it prints goes to a file.

    Raises:
        UserError: the training failed, or the folder's run has other settings.
    """
    command = [*arguments, "--output", str(folder)]
    before = 0.0
    if holds_run(folder):
        wanted, _, _ = train.parse(command)
        if read_settings(folder / checkpoint.CONFIG) != wanted:
            raise UserError(f"{folder} holds a training with other settings, choose another --output")
        before = sum(row["seconds"] for row in read_rows(folder / "metrics.jsonl") if row["epoch"])
        command.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / PRINTED).open("w") as printed, redirect_stdout(printed), redirect_stderr(printed):
        train.main(command)
    finished = {"seconds": before + time.perf_counter() - start, "arguments": list(arguments)}
    (folder / FINISHED).write_text(json.dumps(finished))


def last_row(folder: Path) -> dict[str, float]:
    """The last epoch's figures."""
    return read_rows(folder / "metrics.jsonl")[-1]


def mean_weight(folder: Path) -> float:
    """Mean over the epochs of the revision's mean weight in a CGE training."""
    return statistics.mean(row["mean_weight"] for row in read_rows(folder / "metrics.jsonl") if row["epoch"])


def seconds(folder: Path) -> float:
    """How long a training took."""
    return json.loads((folder / FINISHED).read_text())["seconds"]


def run_rows(
    output: Path, rows: Sequence[Row], seeds: int, common: Sequence[str], jobs: int
) -> dict[tuple[str, int], str]:
    """Trains the rows that are missing, each once whatever number of rows share it.

    Args:
        output: the runs lie below it.
        rows: what to train.
        seeds: 0, 1, ... of each row.
        common: command line of every training.
        jobs: processes, which share the processor's cores.

    Returns:
        messages of the trainings that failed, by row's name and seed.
    """
    plain = [row for row in rows if row.scaled_by is None]
    scaled = [row for row in rows if row.scaled_by is not None]
    sources = [Row(f"source of {row.name}", row.scaled_by) for row in scaled]
    failures: dict[tuple[str, int], str] = {}
    failed_folders: dict[Path, str] = {}
    total = {folder_of(output, row, seed) for row in rows for seed in range(seeds)}
    total |= {folder_of(output, row, seed) for row in sources for seed in range(seeds)}
    whole = {folder for folder in total if is_whole(folder)}
    started: set[Path] = set()
    with (
        executor(jobs) as submit,
        tqdm(total=len(total), initial=len(whole), desc="trainings", unit=" run") as bar,
    ):
        # Those that take another training's mean weight come after it.
        for stage in ([*plain, *sources], scaled):
            pending: dict[Future, Path] = {}
            for seed in range(seeds):
                for row in stage:
                    folder = folder_of(output, row, seed)
                    if folder in started:
                        continue
                    started.add(folder)
                    arguments = [*common, *row.options, "--seed", str(seed)]
                    if row.scaled_by is not None:
                        source = run_folder(output, row.scaled_by, False, seed)
                        if not is_whole(source):
                            failed_folders[folder] = "the training that it takes the mean weight from failed"
                            continue
                        arguments += ["--model.logit_scale", f"{mean_weight(source):.4f}"]
                    if folder in whole:
                        require_same(folder, arguments)
                        continue
                    pending[submit(run, folder, arguments)] = folder
            for future in as_completed(pending):
                try:
                    future.result()
                except UserError as error:
                    failed_folders[pending[future]] = one_line(error)
                bar.update()
    for row in rows:
        for seed in range(seeds):
            message = failed_folders.get(folder_of(output, row, seed))
            if message:
                failures[row.name, seed] = message
    return failures


@contextmanager
def executor(jobs: int) -> Iterator[Callable[..., Future]]:
    """Gives a function like Executor.submit; one job runs in this process."""
    if jobs == 1:
        yield run_now
        return
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads  # read when a process loads torch
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            try:
                yield pool.submit
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def run_now(function: Callable, *arguments: object) -> Future:
    """A future that is done already."""
    future: Future = Future()
    try:
        future.set_result(function(*arguments))
    except UserError as error:
        future.set_exception(error)
    return future


def command_of(common: Sequence[str], row: Row) -> str:
    """The training's command line, but for seed and output."""
    scale = " --model.logit_scale MEAN_W" if row.scaled_by is not None else ""
    return f"{Path(sys.executable).stem} -m {train.PROGRAM} {' '.join([*common, *row.options])}{scale}"

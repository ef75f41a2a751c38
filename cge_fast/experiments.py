"""Trains rows of a table over several seeds and writes the table: python -m cge_fast.experiments controls --help"""

import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from jsonargparse import ArgumentParser
from tqdm import tqdm

from cge_fast import checkpoint, errors
from cge_fast.config import read_settings
from cge_fast.errors import UserError
from cge_fast.log import read_rows
from cge_fast.train import parse
from cge_fast.training import holds_run

PROGRAM = "cge_fast.experiments"

# Revision multiplies the logits by weights near 0.7, so a gain of CGE may be a gain of another logit scale: the
# baseline is trained at that scale too, and at the 0.5 of classes never seen.
CONTROLS = {
    "BOT": ["--model.cge", "false"],
    "BOT, logits x 0.71": ["--model.cge", "false", "--model.logit_scale", "0.71"],
    "BOT, logits x 0.5": ["--model.cge", "false", "--model.logit_scale", "0.5"],
    "CGE": ["--model.cge", "true"],
    "CGE, detached weights": ["--model.cge", "true", "--model.local_gradient", "false"],
}
COMPARED_WITH = ("BOT", "BOT, logits x 0.71")


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Trains the BagTricks baseline, the baseline at two smaller logit scales, CGE, and CGE with "
        "detached weights, with the same seeds, and writes table.md. Runs that are there already are not repeated, "
        "interrupted ones are continued. What stands after -- goes to every training.",
        exit_on_error=False,
    )
    parser.add_argument("table", choices=["controls"], help="which table")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, seeds 0, 1, ...")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the processor's cores")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    for name in ("seeds", "jobs"):
        if options[name] < 1:
            raise UserError(f"{name}: must be at least 1, got {options[name]}")
    training = arguments[split + 1 :]
    runs = [(row, seed) for seed in range(options.seeds) for row in CONTROLS]
    with ThreadPoolExecutor(options.jobs) as pool, tqdm(total=len(runs), desc="trainings", unit=" run") as bar:
        jobs = [pool.submit(train, options.output, row, seed, training, options.jobs) for row, seed in runs]
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shown = ["python", "-m", PROGRAM, *arguments]
    text = table(options.output, options.seeds, shlex.join(shown))
    (options.output / "table.md").write_text(text)
    print(text)


def run_folder(output: Path, row: str, seed: int) -> Path:
    """Where one training of a row lies."""
    return output / row.replace(",", "").replace(" ", "-") / f"seed-{seed}"


def train(output: Path, row: str, seed: int, training: Sequence[str], jobs: int) -> None:
    """Trains one row with one seed, or what is left of it, in a process of its own.

    Raises:
        UserError: the training failed (its last line is the message), or the folder's run has other settings.
    """
    folder = run_folder(output, row, seed)
    arguments = [*training, *CONTROLS[row], "--seed", str(seed), "--output", str(folder)]
    if holds_run(folder):
        wanted, _, _ = parse(arguments)
        if read_settings(folder / checkpoint.CONFIG) != wanted:
            raise UserError(f"{row}, seed {seed}: {folder} holds a run with other settings, choose another --output")
        arguments.append("--resume")
    command = [sys.executable, "-m", "cge_fast.train", *arguments]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{row}, seed {seed}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def measured(output: Path, row: str, seeds: int) -> list[dict[str, float]]:
    """The last epoch's figures of a row, by seed."""
    return [read_rows(run_folder(output, row, seed) / "metrics.jsonl")[-1] for seed in range(seeds)]


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """Percent, mean and standard deviation over seeds."""
    percent = [100 * value for value in values]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):{sign}.1f}{spread}"


def table(output: Path, seeds: int, command: str) -> str:
    """Markdown: mAP and rank-1 of each row, and its differences in mAP from two baselines with the same seeds."""
    results = {row: measured(output, row, seeds) for row in CONTROLS}
    lines = [
        "| row | mAP % | rank-1 % | " + " | ".join(f"mAP less {base}" for base in COMPARED_WITH) + " |",
        "|---|---|---|" + "---|" * len(COMPARED_WITH),
    ]
    for row, figures in results.items():
        cells = [mean_and_spread([run[key] for run in figures]) for key in ("mAP", "rank1")]
        for base in COMPARED_WITH:
            pairs = zip(figures, results[base], strict=True)
            cells.append(
                "" if row == base else mean_and_spread([run["mAP"] - other["mAP"] for run, other in pairs], "+")
            )
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            f"Mean ± standard deviation over {seeds} seeds; differences are paired by seed.",
            "",
            f"    {command}",
            "",
        ]
    )


if __name__ == "__main__":
    errors.run(main, PROGRAM)

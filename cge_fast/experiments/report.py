"""A table of measured rows, as Markdown and CSV, with the paper's figures beside them."""

import csv
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from cge_fast.analyze.written import write_csv
from cge_fast.experiments.runs import command_of, folder_of, is_whole, last_row, mean_weight, seconds
from cge_fast.experiments.tables import TITLES, Row

PAPER = Path(__file__).parent / "paper.csv"  # table, row, data, mAP, rank1: in percent, as printed in the paper
NOTHING = "-"
READING = (
    "Mean ± standard deviation over the seeds; differences are of mAP and paired by seed. Mean w: of the revision, "
    "over all classes and the samples of every tenth step. Less baseline x mean w: where a row has no such control of "
    "its own, that of CGE with the recipe's settings. Precision: of each stripe's classifier on the training images, "
    "last epoch."
)


def mean_and_spread(percent: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    if not percent:
        return NOTHING
    spread = f" ± {stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{mean(percent):{sign}.1f}{spread}"


def lines_of(table: str, data: str, output: Path, rows: Sequence[Row], seeds: int, common: Sequence[str]) -> list[dict]:
    """What the table says of each row: texts by column."""
    with PAPER.open() as file:
        paper = {
            line["row"]: f"{line['mAP']} / {line['rank1']}"
            for line in csv.DictReader(file)
            if (line["table"], line["data"]) == (table, data)
        }
    results: dict[str, dict[int, dict]] = {}  # figures of the last epoch by row and seed, as far as there are any
    for row in rows:
        folders = {seed: folder_of(output, row, seed) for seed in range(seeds)}
        results[row.name] = {seed: last_row(folder) for seed, folder in folders.items() if is_whole(folder)}

    def difference(name: str, base: str | None) -> str:
        """Points of mAP above another row, paired by seed."""
        pairs = [(figures, results.get(base, {}).get(seed)) for seed, figures in results[name].items()]
        return mean_and_spread([100 * (ours["mAP"] - theirs["mAP"]) for ours, theirs in pairs if theirs], "+")

    lines = []
    for row in rows:
        figures = results[row.name].values()
        whole = [folder_of(output, row, seed) for seed in results[row.name]]
        matched = f"{row.base}, logits x mean w"
        precision = [figure["stripe_precision"] for figure in figures if figure["stripe_precision"]]
        stripes = [f"{100 * mean(stripe):.0f}" for stripe in zip(*precision, strict=True)]
        lines.append(
            {
                "row": row.name,
                "paper mAP / rank-1": paper.pop(row.name, NOTHING),
                "mAP %": mean_and_spread([100 * figure["mAP"] for figure in figures]),
                "rank-1 %": mean_and_spread([100 * figure["rank1"] for figure in figures]),
                "mAP less its baseline": difference(row.name, row.base),
                "mAP less baseline x mean w": NOTHING if matched == row.name else difference(row.name, matched),
                "mean w": f"{mean(map(mean_weight, whole)):.3f}" if precision else NOTHING,
                "precision of M_i %": " ".join(stripes) or NOTHING,
                "seeds": str(len(whole)),
                "s a run": f"{mean(map(seconds, whole)):.0f}" if whole else NOTHING,
                "command": command_of(common, row),
            }
        )
    empty = dict.fromkeys(lines[0], NOTHING)
    return lines + [empty | {"row": row, "paper mAP / rank-1": figures} for row, figures in paper.items()]


def write(
    table: str,
    data: str,
    output: Path,
    rows: Sequence[Row],
    seeds: int,
    common: Sequence[str],
    failures: dict[tuple[str, int], str],
    command: Sequence[str],
) -> str:
    """Writes TABLE.md and TABLE.csv below `output`; returns the Markdown."""
    lines = lines_of(table, data, output, rows, seeds, common)
    write_csv(output / f"{table}.csv", lines)
    shown = [column for column in lines[0] if column != "command"]
    folders, first = {folder_of(output, row, seed) for row in rows for seed in range(seeds)}, output / "first"
    total = sum(seconds(folder) for folder in [*sorted(folders), first] if is_whole(folder))
    before = f", with the {seconds(first) / 60:.0f} of the one that they start from" if is_whole(first) else ""
    text = [
        f"# {table}, {data}: {TITLES[table]}\n",
        "| " + " | ".join(shown) + " |",
        "|---|" + "---:|" * (len(shown) - 1),
        *("| " + " | ".join(line[column] for column in shown) + " |" for line in lines),
        f"\n{READING} All trainings of this table: {total / 60:.0f} minutes of one process{before}.",
        *(f"Failed: {row}, seed {seed}: {message}" for (row, seed), message in failures.items()),
        f"\n    {shlex.join(command)}\n",
        "Each row's training:\n",
        *(f"- {line['row']}: `{line['command']}`" for line in lines if line["command"] != NOTHING),
        "",
    ]
    (output / f"{table}.md").write_text("\n".join(text))
    return "\n".join(text)

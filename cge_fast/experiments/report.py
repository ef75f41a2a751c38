"""A table of measured rows, as Markdown and CSV, with the paper's figures beside them."""

import csv
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from cge_fast.analyze.written import write_csv
from cge_fast.experiments.runs import command_of, folder_of, is_whole, last_row, mean_weight, seconds
from cge_fast.experiments.tables import TITLES, Row

PAPER = Path(__file__).parent / "paper.csv"  # table, row, data, mAP, rank1: in percent, as printed in the paper
NOTHING = "-"


def paper_figures() -> dict[tuple[str, str, str], tuple[float, float]]:
    """mAP and rank-1 in percent, by table, row and data set."""
    with PAPER.open() as file:
        return {
            (line["table"], line["row"], line["data"]): (float(line["mAP"]), float(line["rank1"]))
            for line in csv.DictReader(file)
        }


def mean_and_spread(percent: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    if not percent:
        return NOTHING
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):{sign}.1f}{spread}"


def measured(output: Path, row: Row, seeds: int) -> dict[int, dict[str, float]]:
    """The last epoch's figures of a row, by seed, as far as there are any."""
    folders = {seed: folder_of(output, row, seed) for seed in range(seeds)}
    return {seed: last_row(folder) for seed, folder in folders.items() if is_whole(folder)}


def differences(results: dict[int, dict[str, float]], base: dict[int, dict[str, float]]) -> list[float]:
    """Points of mAP above another row, paired by seed."""
    return [100 * (results[seed]["mAP"] - base[seed]["mAP"]) for seed in sorted(results.keys() & base.keys())]


def lines_of(table: str, data: str, output: Path, rows: Sequence[Row], seeds: int, common: Sequence[str]) -> list[dict]:
    """What the table says of each row: texts by column."""
    paper = paper_figures()
    results = {row.name: measured(output, row, seeds) for row in rows}
    lines = []
    for row in rows:
        by_seed = results[row.name]
        matched = f"{row.base}, logits x mean w" if row.base else ""
        known = paper.get((table, row.name, data))
        precision = [figures["stripe_precision"] for figures in by_seed.values() if figures["stripe_precision"]]
        whole = [folder_of(output, row, seed) for seed in by_seed]
        weights = [mean_weight(folder) for folder in whole] if precision else []
        lines.append(
            {
                "row": row.name,
                "paper mAP / rank-1": f"{known[0]} / {known[1]}" if known else NOTHING,
                "mAP %": mean_and_spread([100 * figures["mAP"] for figures in by_seed.values()]),
                "rank-1 %": mean_and_spread([100 * figures["rank1"] for figures in by_seed.values()]),
                "mAP less its baseline": mean_and_spread(differences(by_seed, results.get(row.base, {})), "+"),
                "mAP less baseline x mean w": NOTHING
                if matched == row.name
                else mean_and_spread(differences(by_seed, results.get(matched, {})), "+"),
                "mean w": f"{statistics.mean(weights):.3f}" if weights else NOTHING,
                "precision of M_i %": " ".join(
                    f"{100 * statistics.mean(stripe):.0f}" for stripe in zip(*precision, strict=True)
                )
                or NOTHING,
                "seeds": str(len(by_seed)),
                "s a run": f"{statistics.mean(seconds(folder) for folder in whole):.0f}" if whole else NOTHING,
                "command": command_of(common, row),
            }
        )
    names = {row.name for row in rows}
    others = [
        (row, figures) for (of, row, on), figures in paper.items() if of == table and on == data and row not in names
    ]
    empty = dict.fromkeys(lines[0], NOTHING)
    return lines + [empty | {"row": row, "paper mAP / rank-1": f"{mAP} / {rank1}"} for row, (mAP, rank1) in others]


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
    folders = {folder_of(output, row, seed) for row in rows for seed in range(seeds)}
    first = output / "first"
    total = sum(seconds(folder) for folder in [*sorted(folders), first] if is_whole(folder))
    before = f", with the {seconds(first) / 60:.0f} of the one that they start from" if is_whole(first) else ""
    text = "\n".join(
        [
            f"# {table}, {data}: {TITLES[table]}",
            "",
            "| " + " | ".join(shown) + " |",
            "|---|" + "---:|" * (len(shown) - 1),
            *("| " + " | ".join(line[column] for column in shown) + " |" for line in lines),
            "",
            "Mean ± standard deviation over the seeds; differences are of mAP and paired by seed. Mean w: of the "
            "revision, over all classes and the samples of every tenth step. Less baseline x mean w: where a row has "
            "no such control of its own, that of CGE with the recipe's settings. Precision: of each stripe's "
            "classifier on the training images, last epoch. All trainings of this table: "
            f"{total / 60:.0f} minutes of one process{before}.",
            *(f"Failed: {row}, seed {seed}: {message}" for (row, seed), message in failures.items()),
            "",
            f"    {shlex.join(command)}",
            "",
            "Each row's training:",
            "",
            *(f"- {line['row']}: `{line['command']}`" for line in lines if line["command"] != NOTHING),
            "",
        ]
    )
    (output / f"{table}.md").write_text(text)
    return text

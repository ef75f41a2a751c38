"""A table of measured rows, as Markdown and CSV, with the paper's figures beside them."""

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from cge_fast import files
from cge_fast.analyze.written import write_csv
from cge_fast.cli import RECIPES, flat, read_settings
from cge_fast.errors import UserError
from cge_fast.experiments.presets import Place
from cge_fast.experiments.runs import folder_of, is_whole, last_row, mean_weight, precision, seconds
from cge_fast.experiments.tables import Table

# In percent, as the paper prints them: its own rows, and precisions and what it lists of others.
PAPER, OTHERS = (Path(__file__).parent / f"{name}.csv" for name in ("paper", "paper_others"))
MARKED = re.compile("(<!-- measured -->).*(<!-- end of measured -->)", re.DOTALL)
PROGRAM = "python -m cge_fast.experiments"
NOTHING = "-"
ALWAYS = ("row", "mAP %", "rank-1 %")  # columns that stay where nothing was measured
DIFFERENCES = {  # what the paper's table 8 says of the AGWs of Ye et al. and of Fu et al., and where that stands here
    "image": ("256x128", "384x128", "{data[height]}x{data[width]}"),
    "learning rate falls after": ("40, 70", "40, 90", "{optim[milestones]}"),
    "BNNeck feature": ("after", "before", "test: {evaluation[neck]}; metric loss: before"),
}


def mean_and_spread(percent: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    if not percent:
        return NOTHING
    spread = f" ± {stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{mean(percent):{sign}.1f}{spread}"


def printed(file: Path, key: str) -> dict[tuple[str, str], str]:
    """What the paper prints for a table, by row and data set."""
    with file.open() as opened:
        return {
            (line["row"], line["data"]): line.get("figures") or f"{line['mAP']} / {line['rank1']}"
            for line in csv.DictReader(opened)
            if key.startswith(line["table"])
        }


def lines_of(key: str, table: Table, place: Place, seeds: int) -> list[dict[str, str]]:
    """What the table says of each row: texts by column."""
    rows = place.fitted(table.rows)
    results: dict[str, dict[int, dict]] = {}  # figures of the last epoch by row and seed, as far as there are any
    for row in rows:
        folders = {seed: folder_of(place.output, row, seed) for seed in range(seeds)}
        results[row.name] = {seed: last_row(folder) for seed, folder in folders.items() if is_whole(folder)}

    def difference(name: str, base: str | None) -> str:
        """Points of mAP above another row, paired by seed."""
        by_seed = [(figures, results.get(base, {}).get(seed)) for seed, figures in results[name].items()]
        return mean_and_spread([100 * (ours["mAP"] - theirs["mAP"]) for ours, theirs in by_seed if theirs], "+")

    others = printed(OTHERS, key)
    paper = printed(PAPER, key) | others
    sets = [place.data] if place.data in {data for _, data in paper} else list(dict.fromkeys(data for _, data in paper))

    def of_paper(row: str) -> dict[str, str]:
        """The paper's figures, on the same set if it has that and else on all of its."""
        return {f"paper, {data}": paper.get((row, data), NOTHING) for data in sets}

    lines = []
    for row in rows:
        figures = results[row.name].values()
        whole = [folder_of(place.output, row, seed) for seed in results[row.name]]
        has_memory = any(figure["mean_weight"] for figure in figures)
        scores = zip(*map(precision, whole if table.precision else ()), strict=True)
        lines.append(
            {
                "row": row.name,
                **of_paper(row.name),
                "precision of M_i %": " ".join(f"{100 * mean(score):.1f}" for score in scores) or NOTHING,
                "mAP %": mean_and_spread([100 * figure["mAP"] for figure in figures]),
                "rank-1 %": mean_and_spread([100 * figure["rank1"] for figure in figures]),
                "less its baseline": difference(row.name, row.base),
                "less baseline x mean w": NOTHING
                if row.scaled_by
                else difference(row.name, f"{row.base}, logits x mean w"),
                "mean w": f"{mean(map(mean_weight, whole)):.3f}" if has_memory else NOTHING,
                "seeds": str(len(whole)),
                "s a run": f"{mean(map(seconds, whole)):.0f}" if whole else NOTHING,
            }
        )
    empty = dict.fromkeys(lines[0], NOTHING)
    listed = dict.fromkeys(row for row, data in others if data in sets and row not in results and "-" not in key)
    return lines + [empty | {"row": row} | of_paper(row) for row in listed]


def markdown(lines: Sequence[dict[str, str]], always: Sequence[str]) -> list[str]:
    """The lines of a Markdown table, without columns that hold nothing but for those in `always`."""
    shown = [name for name in lines[0] if name in always or any(line[name] != NOTHING for line in lines)]
    return [
        "| " + " | ".join(shown) + " |",
        "|---|" + "---:|" * (len(shown) - 1),
        *("| " + " | ".join(line[name] for name in shown) + " |" for line in lines),
    ]


def write(
    command: str, tables: dict[str, Table], place: Place, seeds: int | None, failures: dict[tuple[str, int], str]
) -> str:
    """Writes NAME.md and NAME.csv below the place's folder; returns the Markdown.

    Args:
        command: what measures this again; its first word is NAME.
        tables: what the name stands for.
        place: where the rows were trained.
        seeds: of each row; None: as many as each table has.
        failures: messages by row and seed.
    """
    name = command.split()[0]
    text, csv_lines, folders = [f"## {name}, {place.data}\n\n    {PROGRAM} {command}\n"], [], set()
    for key, table in tables.items():
        lines = lines_of(key, table, place, seeds or table.seeds)
        text += [f"### {key}: {table.title}\n", *markdown(lines, ALWAYS), ""]
        csv_lines += [{"table": key} | line for line in lines]
        rows = place.fitted(table.rows)
        folders |= {folder_of(place.output, row, seed) for row in rows for seed in range(seeds or table.seeds)}
    first = place.output / "first"
    total = sum(seconds(folder) for folder in [*sorted(folders), first] if is_whole(folder))
    before = f", with the {seconds(first) / 60:.0f} of the one that they start from" if is_whole(first) else ""
    text += [f"Columns: docs/results.md. All trainings above: {total / 60:.0f} minutes of one process{before}."]
    text += [*(f"Failed: {row}, seed {seed}: {message}" for (row, seed), message in failures.items()), ""]
    place.output.mkdir(parents=True, exist_ok=True)
    write_csv(place.output / f"{name}.csv", csv_lines)
    files.replace(place.output / f"{name}.md", "\n".join(text).encode())
    return "\n".join(text)


def of_recipes() -> str:
    """The paper's table 8: what differs between two AGWs, here the recipes agw_original and cge_agw without CGE."""
    ye, fu = (asdict(read_settings(RECIPES / f"{name}.yaml")) for name in ("agw_original", "cge_agw"))
    fu["model"] |= {name: ye["model"][name] for name in ("cge", "stripes", "memory_momentum")}
    columns = ("", "paper: Ye et al.", "paper: Fu et al.", "agw_original", "cge_agw, model.cge false")
    lines = [(name, *paper, form.format(**ye), form.format(**fu)) for name, (*paper, form) in DIFFERENCES.items()]
    theirs = dict(flat(fu))
    lines += [
        (f"`{name}`", "", "", str(value), str(theirs[name]))
        for name, value in flat(ye)
        if not isinstance(value, dict) and value != theirs[name] and name not in ("data.height", "optim.milestones")
    ]
    title = "## table8: What differs between two AGWs, printed from the recipes\n"
    return "\n".join([title, *markdown([dict(zip(columns, line, strict=True)) for line in lines], columns), ""])


def put(file: Path, texts: Sequence[str]) -> None:
    """Replaces what stands between the marks in a Markdown file; UserError if it has none."""
    tables = "\n".join(texts)
    text, found = MARKED.subn(lambda marks: f"{marks[1]}\n\n{tables}\n{marks[2]}", file.read_text())
    if not found:
        raise UserError(f"into: {file} must have <!-- measured --> and <!-- end of measured --> around the tables")
    files.replace(file, text.encode())

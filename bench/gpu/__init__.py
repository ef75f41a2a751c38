"""For whoever has a GPU: is everything right on it, and how fast is it? At most 8 minutes, without network.

The parts, in checks.py and speed.py, run one after the other, each in a process of its own with a limit of time, so
that one that fails, crashes or hangs hides nothing of the others. Figures and expectations go to results.json and
results.md in the output folder; if an expectation does not hold, the exit status is 1. Beside torch and Triton this
needs only jsonargparse; what needs more is skipped by name.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from jsonargparse import ArgumentParser

from bench.gpu import checks, speed
from bench.gpu.checks import Expectation, Item
from bench.results import Figure, by_table, origin, table
from cge_fast.errors import UserError
from cge_kernels.common.device_functions import INTERPRETED

Part = Callable[[checks.Place], Iterator[Item]]
PARTS: dict[str, tuple[Part, int]] = {  # and the seconds that each may take
    "parity": (checks.parity, 180),
    "steps": (checks.steps, 80),
    "heads": (speed.heads, 100),
    "network": (speed.network, 150),
    "peers": (speed.peers, 60),
    "kernels": (speed.kernels, 240),
}
DEADLINE = 470  # seconds for all
DRY = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def add_options(parser: ArgumentParser) -> None:
    """Of `python -m bench gpu`."""
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and results.md")
    parser.add_argument("--dry", action="store_true", help="the same path without a GPU: tiny, in Triton's interpreter")


def measure(output: Path, dry: bool) -> Iterator[Figure]:
    """What every part measured; after each part the files hold what is known.

    Raises:
        UserError: there is no GPU.
        SystemExit: an expectation does not hold.
    """
    if not (dry or torch.cuda.is_available()):
        raise UserError("gpu: PyTorch finds none here; --dry runs the same path without one")
    output.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    expectations: list[Expectation] = []
    end = time.monotonic() + DEADLINE
    for part, (function, longest) in PARTS.items():
        seconds = max(1, min(longest, round(end - time.monotonic())))
        print(f"{part}: at most {seconds} s", file=sys.stderr)
        for item in run(part, function, dry, seconds):
            figures += [item] if isinstance(item, Figure) else []
            expectations += [item] if isinstance(item, Expectation) else []
            yield from figures[-1:] if isinstance(item, Figure) else ()
        known = {"dry": dry, "expectations": list(map(asdict, expectations)), "figures": list(map(asdict, figures))}
        (output / "results.json").write_text(json.dumps(origin() | known, indent=1))
        (output / "results.md").write_text(page(figures, expectations, dry))
    if broken := [f"does not hold: {one.what}: {one.detail}" for one in expectations if one.holds is False]:
        print(*broken, sep="\n", file=sys.stderr)
        raise SystemExit(1)


def run(part: str, function: Part, dry: bool, seconds: float) -> list[Item]:
    """A part's items, from a process of its own; where kernels are interpreted anyway, a dry one runs in this one."""
    with TemporaryDirectory() as folder:
        file, end = Path(folder) / "items", ""
        file.touch()
        if dry and INTERPRETED.value:
            write_items(part, function, dry, file)
        else:
            process = get_context("spawn").Process(target=write_items_apart, args=(part, function, dry, file))
            with patch.dict(os.environ, DRY if dry else {}):
                process.start()
            try:
                process.join(seconds)
                end = f"status {process.exitcode}" if process.exitcode else ""
            finally:
                if process.is_alive():
                    with suppress(ProcessLookupError):  # it has no session of its own before the part begins
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                    process.join()
                    end = f"it took longer than {seconds} s"
        lines = map(json.loads, file.read_text().splitlines())
        items = [Figure(**fields) if "bench" in fields else Expectation(**fields) for fields in lines]
    return [*items, *([Expectation(f"{part} runs to its end", False, end)] if end else [])]


def write_items_apart(part: str, function: Part, dry: bool, file: Path) -> None:
    """`write_items` in a session of its own, so that it can be killed with the processes that it has started."""
    os.setsid()
    write_items(part, function, dry, file)


def write_items(part: str, function: Part, dry: bool, file: Path) -> None:
    """Runs a part and writes each item, a line of JSON, as soon as it is there."""
    with file.open("w", buffering=1) as opened:
        try:
            for item in function(checks.place(dry)):
                print(json.dumps(asdict(item)), file=opened)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(asdict(Expectation.after(f"{part} runs to its end", error))), file=opened)


def page(figures: list[Figure], expectations: list[Expectation], dry: bool) -> str:
    """The Markdown page: what does not hold, what was skipped, and the tables."""
    here = origin()
    blocks = [f"# {'Dry run, without a GPU' if dry else here['machine']}", "; ".join(here.values())]
    if dry:
        blocks.append("Every time is that of an interpreter and means nothing.")
    for title, state in (("Do not hold", False), ("Skipped", None), ("Hold", True)):
        if lines := [f"- {one.what}{one.detail and ': ' + one.detail}" for one in expectations if one.holds is state]:
            blocks += [f"## {title}: {len(lines)} of {len(expectations)} expectations", "\n".join(lines)]
    for name, chosen in by_table(figures).items():
        blocks += [f"## {name}", table(chosen)]
    return "\n\n".join(blocks) + "\n"

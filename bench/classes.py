"""Memory and time of the loss over the number of identities: python -m bench.classes --help

revised_cross_entropy, forward and backward, of this project and of cge_reference under torch.compile and eager, at B
256, C 512 and n 3 in float32, one contender after the other in a process of its own. Extra memory: the most bytes of
tensors that a step holds beyond its arguments, less those of its results (losses, hits and gradients). The share of the
matmul peak counts the FLOPs of the products that the mathematics needs (two forward for each number of classifier and
memory, four backward for the classifier's and two for the memory's), not those of scores that are computed again.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from bench.cases import COMPILED, EAGER, OURS, Case, contenders, default_device
from bench.ceilings import measure_ceilings
from bench.measure import peak_bytes, run
from bench.shapes import Shape
from bench.tables import table
from bench.work import work
from cge_fast import errors

PROGRAM = "bench.classes"
CASE = Case("revised_cross_entropy")
CONTENDERS = (OURS, EAGER, COMPILED)


@dataclass(frozen=True)
class Point:
    """One contender at one number of classes: bytes, median seconds of a step, FLOP/s of a large matmul beside it."""

    contender: str
    classes: int
    extra_bytes: int
    seconds: float
    matmul: float


def shape_of(classes: int, batch: int, channels: int) -> Shape:
    """Three stripes; the map is of no use here."""
    return Shape(batch=batch, channels=channels, height=3, width=1, classes=classes)


def result_bytes(shape: Shape) -> int:
    """Losses, hits, and the gradients of features, classifier and local features; and the losses' gradient."""
    gradients = shape.batch * shape.channels * (1 + shape.stripes) + shape.classes * shape.channels
    return 4 * gradients + shape.batch * (2 * 4 + 1 + shape.stripes)


def measure(contender: str, shape: Shape, rounds: int) -> Point:
    """In this process; the first run, in which torch.compile compiles, does not count."""
    device = default_device()
    compared = contenders(CASE, shape, torch.float32, device, with_compiled=contender == COMPILED)[contender]
    run(compared, device)
    seconds = torch.tensor([run(compared, device)["step"] for _ in range(rounds)]).median().item()
    extra = peak_bytes(compared, device) - result_bytes(shape)
    return Point(contender, shape.classes, extra, seconds, measure_ceilings(device, torch.float32, rounds).flops)


def measure_apart(contender: str, shape: Shape, rounds: int) -> Point:
    """In a process of its own, so that none finds memory that another one left."""
    numbers = f"--classes={shape.classes}", f"--batch={shape.batch}", f"--channels={shape.channels}"
    command = [sys.executable, "-m", PROGRAM, f"--contenders={contender}", *numbers, f"--rounds={rounds}", "--json"]
    root = Path(__file__).parents[1]
    return Point(**json.loads(subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True).stdout))


def rows(points: list[Point], batch: int, channels: int) -> list[tuple[str, ...]]:
    """Rows of the table."""
    found = []
    for point in points:
        needed = work(CASE.operator, shape_of(point.classes, batch, channels))
        flops = needed["forward"].flops + needed["backward"].flops
        ours = next((p for p in points if (p.contender, p.classes) == (OURS, point.classes)), None)
        found.append(
            (
                *(f"{point.classes:,}", point.contender, f"{point.extra_bytes / 2**20:,.0f}", f"{point.seconds:.2f}"),
                f"{point.seconds / point.classes * 1e6:.1f}",
                f"{flops / point.seconds / point.matmul:.0%}",
                f"{point.seconds / ours.seconds:.2f}" if ours else "",
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Memory and time of revised_cross_entropy, forward and backward, over the number of identities. "
        "CGE_SCRATCH_MB sets its scratch budget. With a million identities it needs 12 GiB.",
        exit_on_error=False,
    )
    parser.add_argument("--classes", type=PositiveInt, nargs="+", default=[20_000, 200_000, 1_000_000], help="N")
    parser.add_argument("--batch", type=PositiveInt, default=256, help="B")
    parser.add_argument("--channels", type=PositiveInt, default=512, help="C")
    parser.add_argument("--contenders", nargs="+", type=str, choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=PositiveInt, default=3, help="steps that count, of each contender")
    parser.add_argument("--markdown", action="store_true", help="table in Markdown")
    parser.add_argument("--json", action="store_true", help="of one contender at one size: its figures as JSON")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    shapes = [shape_of(classes, options.batch, options.channels) for classes in options.classes]
    if options.json:
        print(json.dumps(asdict(measure(options.contenders[0], shapes[0], options.rounds))))
        return
    points = []
    pairs = [(contender, shape) for shape in shapes for contender in options.contenders]
    for contender, shape in tqdm(pairs, unit=" measurement"):
        points.append(measure_apart(contender, shape, options.rounds))
    header = ("N", "contender", "extra MiB", "seconds", "us for each class", "of the matmul peak", "time / ours")
    print(table(header, rows(points, options.batch, options.channels), options.markdown))


if __name__ == "__main__":
    errors.run(main, PROGRAM)

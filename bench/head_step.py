"""Time of the head's step against its floor, and where it goes: python -m bench.head_step

The step is the head's forward and backward, without the memory's write, as bench/cases.py has it for the project and
for cge_reference, eager and under torch.compile, which take turns. Beneath: what such a step takes at least, if bytes
move at the rate of a large copy, products are computed at that of a large matmul and powers x^p at that of log2
followed by exp2, one after the other, all measured in the same run; and the project's operators one by one.
"""

import argparse

import torch

from bench.cases import OURS, Case, compare, default_device
from bench.ceilings import measure_ceilings
from bench.compiler import missing_compiler
from bench.measure import Contender, Times, take_turns
from bench.shapes import SHAPES, Shape, named
from bench.work import work
from cge_fast import errors

PROGRAM = "bench.head_step"
SECONDS = 60.0  # for each comparison, at most about
POWERS = 1 << 19  # numbers whose logarithms stay in the cache


def power_rate(device: torch.device, rounds: int) -> float:
    """Numbers per second of log2, then exp2."""
    numbers = torch.rand(POWERS, device=device) + 0.5
    logs = torch.empty_like(numbers)
    times = take_turns({"power": Contender(lambda: torch.log2(numbers, out=logs).exp2_())}, device, rounds)
    return POWERS / times["power"]["forward"].median


def floor_lines(shape: Shape, pooling: str, rounds: int) -> list[str]:
    """What the step needs at least, and the rates by which."""
    device = default_device()
    ceilings, powers_per_second = measure_ceilings(device, torch.float32, rounds), power_rate(device, rounds)
    needed = work("head", shape, pooling)
    both = needed["forward"] + needed["backward"]
    # GeM takes x^p of each number in the forward and x^(p-1) in the backward.
    powers = 2 * shape.batch * shape.channels * shape.height * shape.width if pooling == "gem" else 0
    parts = both.bytes / ceilings.bandwidth, both.flops / ceilings.flops, powers / powers_per_second
    moving, multiplying, raising = (part * 1e3 for part in parts)
    return [
        f"copy {ceilings.bandwidth / 1e9:.1f} GB/s, matmul {ceilings.flops / 1e9:.0f} GFLOP/s, "
        f"log2 and exp2 {powers_per_second / 1e9:.2f} G/s",
        f"floor {sum(parts) * 1e3:.1f} ms: {both.bytes / 1e6:.0f} MB in {moving:.1f}, {both.flops / 1e9:.2f} GFLOP in "
        f"{multiplying:.1f}, {powers / 1e6:.0f} M powers in {raising:.1f}",
    ]


def line(name: str, times: Times, ours: Times) -> str:
    """Median, percentiles and ratio."""
    low, high = (moment * 1e3 for moment in times.percentiles)
    ratio = times.median / ours.median
    return f"  {name:<34}{times.median * 1e3:9.1f} ms{times.mark:1} (20% {low:.1f}, 80% {high:.1f})  {ratio:.2f}x"


def report(shape: Shape, pooling: str, rounds: int) -> str:
    """Table, floor and parts of one pooling."""
    steps = compare(Case("head", pooling), shape, torch.float32, rounds, SECONDS)
    ours = steps[OURS]["step"]
    lines = [f"{pooling}: {shape}, float32", *(line(name, laps["step"], ours) for name, laps in steps.items())]
    lines += [f"  {text}" for text in floor_lines(shape, pooling, rounds)]
    for case in (Case("stripe_pool", pooling), Case("revised_cross_entropy")):
        laps = compare(case, shape, torch.float32, rounds, SECONDS, only=OURS)[OURS]
        lines += [line(f"{case.operator}, {direction}", laps[direction], ours) for direction in ("forward", "backward")]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="msmt17", help=f"of {', '.join(SHAPES)}; default msmt17")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each, at most; default 15")
    options = parser.parse_args(arguments)
    shape = named([options.shape])[options.shape]
    if missing_compiler():
        print(f"torch.compile is left out, it cannot run here: {missing_compiler()}")
    for pooling in ("gem", "average"):
        print(report(shape, pooling, options.rounds), flush=True)


if __name__ == "__main__":
    errors.run(main, PROGRAM)

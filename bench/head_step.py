"""Time of the head's forward and backward on the CPU at the paper's size: python -m bench.head_step

The same head, from the feature map to the gradients of map, classifier, neck and exponent, with three sets of
operators: cge_kernels, cge_reference as it stands, and cge_reference under torch.compile. One step of each in turn, so
that whatever else the machine does falls on all of them. Beneath the table: the floor that follows from the bytes and
FLOPs a step cannot do without and the rates measured here, and where the time of cge_kernels goes.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from cge_fast.head import CGEHead, Pooling
from cge_kernels.revise_backward import revise_logits_backward_op
from cge_kernels.revise_logits import revise_logits_op
from cge_kernels.stripe_pool import stripe_pool_backward_op, stripe_pool_op

BATCH, CHANNELS, HEIGHT, WIDTH, STRIPES, CLASSES = 64, 2048, 24, 8, 3, 1041
EPS = 1e-6
WARMUP = 2
OURS, EAGER, COMPILED = "cge_kernels", "cge_reference", "cge_reference, torch.compile"


class Example:
    """A head, its feature map (B, C, H, W) float32 after a ReLU, and labels (B,)."""

    def __init__(self, pooling: Pooling):
        torch.manual_seed(0)
        sizes = {"in_channels": CHANNELS, "num_classes": CLASSES, "epochs": 120, "stripes": STRIPES}
        self.head = CGEHead(**sizes, pooling=pooling)
        self.head.memory.copy_(normalize(torch.randn_like(self.head.memory), dim=2))
        self.reference = CGEHead(**sizes, pooling=pooling, kernels="reference")
        self.reference.load_state_dict(self.head.state_dict())
        self.feature_map = torch.randn(BATCH, CHANNELS, HEIGHT, WIDTH).relu_().requires_grad_()
        self.labels = torch.randint(CLASSES, (BATCH,))

    def step(self, head: Callable) -> None:
        """Forward and backward; gradients of the step before are let go."""
        self.feature_map.grad = None
        self.head.zero_grad()
        self.reference.zero_grad()
        head(self.feature_map, self.labels).loss.backward()

    def contenders(self) -> dict[str, Callable[[], None]]:
        """A step with each set of operators; without a compiler the last is left out."""
        compiled = torch.compile(self.reference)
        contenders = {
            OURS: lambda: self.step(self.head),
            EAGER: lambda: self.step(self.reference),
            COMPILED: lambda: self.step(compiled),
        }
        try:
            contenders[COMPILED]()
        except torch._inductor.exc.InductorError as error:
            print(f"torch.compile is left out, it cannot run here: {str(error).splitlines()[0]}")
            del contenders[COMPILED]
        return contenders

    def parts(self) -> dict[str, Callable[[], object]]:
        """What a step with cge_kernels consists of."""
        feature_map, memory, p = self.feature_map.detach(), self.head.memory, self.head.p
        p = None if p is None else p.detach()
        global_feature, local_features = stripe_pool_op(feature_map, STRIPES, p, EPS)
        logits = torch.randn(BATCH, CLASSES)
        _, scores, scale = revise_logits_op(logits, local_features, memory, True)
        grad_global, grad_local = torch.randn_like(global_feature), torch.randn_like(local_features)

        def classify() -> None:
            self.head.zero_grad()
            leaf = global_feature.detach().requires_grad_()
            cross_entropy(self.head.classifier(self.head.neck(leaf)), self.labels, label_smoothing=0.1).backward()

        return {
            "pool, forward": lambda: stripe_pool_op(feature_map, STRIPES, p, EPS),
            "revise, forward": lambda: revise_logits_op(logits, local_features, memory, True),
            "neck, classifier and cross entropy, both ways": classify,
            "revise, backward": lambda: revise_logits_backward_op(
                logits, logits, local_features, memory, scores, scale, True
            ),
            "pool, backward": lambda: stripe_pool_backward_op(
                grad_global, grad_local, feature_map, global_feature, local_features, p, EPS
            ),
        }


def milliseconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def in_turn(functions: dict[str, Callable[[], object]], repeats: int, title: str) -> dict[str, Tensor]:
    """Milliseconds (repeats,) of each function; one call of each in turn, after a few that do not count."""
    times = {name: [] for name in functions}
    for _ in tqdm(range(WARMUP + repeats), title):
        for name, function in functions.items():
            times[name].append(milliseconds(function))
    return {name: torch.tensor(values[WARMUP:]) for name, values in times.items()}


def rates(repeats: int) -> tuple[float, float, float]:
    """Bytes per ms of a copy (read and written), FLOPs per ms of a matmul, numbers per ms of log2 then exp2."""
    source = torch.randn(BATCH, CHANNELS, HEIGHT * WIDTH)
    target = torch.empty_like(source)
    left, right = torch.randn(2, CHANNELS, CHANNELS)
    numbers = torch.rand(1 << 19) + EPS
    logs = torch.empty_like(numbers)
    functions = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: left @ right,
        "power": lambda: torch.log2(numbers, out=logs).exp2_(),
    }
    best = {name: times.median().item() for name, times in in_turn(functions, repeats, "rates").items()}
    return 2 * source.nbytes / best["copy"], 2 * CHANNELS**3 / best["matmul"], len(numbers) / best["power"]


def print_floor(pooling: str, bandwidth: float, flops_rate: float, power_rate: float) -> None:
    """What a step must move and compute, and how long that takes at the measured rates."""
    numbers = BATCH * CHANNELS * HEIGHT * WIDTH
    classifier = CLASSES * CHANNELS
    # The map is read for the features, its gradient written; GeM's gradient takes the map a second time. Memory and
    # classifier are read in both directions, the classifier's gradient is written.
    moved = 4 * ((3 if pooling == "gem" else 2) * numbers + 2 * STRIPES * classifier + 3 * classifier)
    # A product with the memory in each direction for each stripe, and the classifier's three.
    flops = 2 * BATCH * classifier * (2 * STRIPES + 3)
    powers = 2 * numbers if pooling == "gem" else 0
    floor = {"bytes": moved / bandwidth, "FLOPs": flops / flops_rate, "powers": powers / power_rate}
    print(f"  measured: copy {bandwidth / 1e6:.1f} GB/s, matmul {flops_rate / 1e6:.0f} GFLOP/s", end="")
    print(f", log2 and exp2 {power_rate / 1e6:.2f} G/s")
    print(f"  floor: {sum(floor.values()):.1f} ms = {moved / 1e6:.0f} MB in {floor['bytes']:.1f}", end="")
    print(f" + {flops / 1e9:.2f} GFLOP in {floor['FLOPs']:.1f} + {powers / 1e6:.0f} M powers in {floor['powers']:.1f}")


def run(pooling: Pooling, repeats: int, measured_rates: tuple[float, float, float]) -> None:
    """Prints table, floor and parts for one pooling."""
    example = Example(pooling)
    steps = in_turn(example.contenders(), repeats, f"{pooling}: steps")
    print(f"\n{pooling}: B {BATCH}, C {CHANNELS}, map {HEIGHT}x{WIDTH}, n {STRIPES}, N {CLASSES}, float32, ms a step")
    ours = steps[OURS].median().item()
    for name, times in steps.items():
        low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        spread = f"20% {low:.1f}, 80% {high:.1f}, least {times.min():.1f}"
        print(f"  {name:<30} {median:8.1f}  ({spread})  {median / ours:.2f}x")
    print_floor(pooling, *measured_rates)
    parts = {
        name: times.median().item() for name, times in in_turn(example.parts(), repeats, f"{pooling}: parts").items()
    }
    for name, median in parts.items():
        print(f"  {name:<46} {median:8.1f} ms")
    print(f"  {'the rest':<46} {ours - sum(parts.values()):8.1f} ms")


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.head_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pooling", choices=("gem", "average", "both"), default="both", help="default both")
    parser.add_argument("--repeats", type=int, default=15, help="steps that count, of each; default 15")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    measured_rates = rates(options.repeats)
    for pooling in ("gem", "average") if options.pooling == "both" else (options.pooling,):
        run(pooling, options.repeats, measured_rates)


if __name__ == "__main__":
    main()

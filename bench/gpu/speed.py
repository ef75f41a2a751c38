"""What is timed on a GPU: steps of the head and of ResNet-50, each kernel, and linear cross entropy beside others'."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import groupby
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import cge_kernels
from bench import cases
from bench.cases import OURS, POOLINGS
from bench.gpu.checks import BACKENDS, Expectation, Item, Place, Step
from bench.measure import FLUSHED, Contender, Instant, extra_bytes, measure_ceilings, take_turns
from bench.results import Figure
from cge_kernels.common.device_functions import INTERPRETED

SECONDS = 8.0  # for those that take turns, about
MOST_OF_PREDICTED = 2.0  # a kernel's time, less that of one that does next to nothing
MOST_OF_REFERENCE = 1.03  # a step's time: that of a network is the same convolutions'


def compare(
    at: Place, place: tuple[str, str, str], makers: dict[str, Callable[[], Any]], quantity: str
) -> Iterator[Item]:
    """Times in turns and extra memory of what the makers make; place: bench, setting and subject.

    That ours runs, and is not slower than the reference, is expected.
    """
    runs, what = {}, f"{', '.join(place)}, {quantity}"
    for name, make in makers.items():
        try:
            run = make()
            run()
            runs[name] = Contender(run, device=at.device)
        except Exception as error:
            yield Expectation.after(f"{what}, {name}", error, False if name == OURS else None)
    found = take_turns(runs, at.rounds, SECONDS) if runs else {}
    for name, laps in found.items():
        yield Figure.median(*place, name, quantity, "s", samples=laps["step"])
        if quantity != "graph":  # whose memory is there before
            yield Figure(f"{place[0]}, extra memory", *place[1:], name, quantity, "B", extra_bytes(runs[name]))
    if found.keys() >= BACKENDS.keys() and not at.is_dry:
        ours, reference = (median(found[name]["step"]) for name in BACKENDS)
        holds = ours <= MOST_OF_REFERENCE * reference
        yield Expectation(f"{what}: not slower than the reference", holds, f"{ours / reference:.2f}")


def heads(at: Place) -> Iterator[Item]:
    """The head's step eager, as a graph and compiled, of a bfloat16 map, against the reference's."""
    for way in at.ways:
        for pooling in POOLINGS:
            makers = {name: lambda name=name: Step(at, name, pooling, way).run for name in BACKENDS}  # noqa: B023
            yield from compare(at, ("step of the head", at.setting, f"head, {pooling}"), makers, way)


def network(at: Place) -> Iterator[Item]:
    """The whole step of ResNet-50 at 384x128 eager, as a graph and compiled; a dry run has a small convolution."""
    try:
        whole = nn.Conv2d(3, at.shape.channels, 8, stride=64) if at.is_dry else resnet50()
    except ImportError as error:
        yield Expectation.after("step of ResNet-50", error, None)
        return
    whole = whole.to(at.device, memory_format=torch.channels_last)
    images = torch.rand(at.shape.batch, 3, 384, 128, device=at.device).to(memory_format=torch.channels_last)
    for way in at.ways:  # both train the same network, so that it is compiled once
        taken = {"way": way, "network": torch.compile(whole) if way == "compiled" else whole, "inputs": images}
        makers = {name: lambda name=name, taken=taken: Step(at, name, **taken).run for name in BACKENDS}
        yield from compare(at, ("step of ResNet-50", at.setting, "384x128"), makers, way)


def resnet50() -> nn.Module:
    """Up to its feature map, with last stride 1, by torchvision if it is installed."""
    whole = import_module("torchvision.models").resnet50()
    for convolution in (whole.layer4[0].conv2, whole.layer4[0].downsample[0]):
        convolution.stride = (1, 1)
    return nn.Sequential(*list(whole.children())[:-2])


def kernels(at: Place) -> Iterator[Item]:
    """Each kernel's time on the device beside its prediction, and its share of a large copy's and matmul's rate."""
    from bench.count.traffic import Problem  # imports NumPy, by way of Triton's interpreter

    problem = Problem(at.shape, "float32" if at.is_dry else "bfloat16")
    dtype = getattr(torch, problem.dtype)
    bandwidth, flops = measure_ceilings(at.device, dtype, at.rounds)
    for name, rate, unit in (("copy", bandwidth, "B/s"), ("matmul", flops, "FLOP/s")):
        yield Figure("rates", problem.dtype, "device", name, "rate", unit, rate)
    nearly_nothing = Contender(torch.empty(1, device=at.device).zero_, device=at.device)
    empty = median(take_turns({"empty": nearly_nothing}, at.rounds)["empty"]["step"])
    yield Figure("kernels", problem.dtype, "one that writes a number", "measured", "time", "s", empty)
    measured: dict[tuple[str, str], float] = {}
    for case in problem.cases:
        contender = cases.contenders(case, at.shape, dtype, at.device, with_compiled=False)[OURS]
        for kernel, seconds in launch_times(contender, at).items():
            measured[str(case), kernel] = seconds
            yield Figure("kernels", problem.dtype, f"{case}: {kernel}", "measured", "time", "s", seconds)
    if INTERPRETED.value:
        yield Expectation("predictions", None, "kernels are interpreted here, and so not compiled")
    else:
        yield from predictions(problem, measured, empty, bandwidth, flops)


def launch_times(contender: Contender, at: Place) -> dict[str, float]:
    """Median seconds of each kernel of a step, by its name; the L2 cache is flushed before each.

    The flush also keeps the GPU busy until kernel and events are queued.
    """
    moments: dict[str, list[tuple[Instant, Instant]]] = defaultdict(list)
    flushed = torch.empty(0 if at.is_dry else FLUSHED, dtype=torch.uint8, device=at.device)

    def timed(launch: cge_kernels.Launch) -> None:
        flushed.zero_()
        start = Instant(at.device)
        launch.run()
        moments[launch.kernel.__name__].append((start, Instant(at.device)))

    with cge_kernels.backend("triton"):
        contender.step()
        with cge_kernels.launching(timed):
            for _ in range(at.rounds):
                contender.step()
    return {name: median(end - start for start, end in found) for name, found in moments.items()}


def predictions(
    problem: Any, measured: dict[tuple[str, str], float], empty: float, bandwidth: float, flops: float
) -> Iterator[Item]:
    """Beside the measured seconds by case and kernel: shares, and times if bench/gpus.toml has the GPU.

    empty: seconds of a kernel that does next to nothing.
    """
    from bench.predict import GPUS, predict, times

    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    known = next((gpu for gpu in GPUS.values() if gpu["name"].split()[0] in name), None)
    if known is None:
        yield Expectation("predicted times", None, f"bench/gpus.toml has no figures of {name}")
    gpu = known or {"name": name, "family": f"sm_{major}{minor}"}
    for (case, _direction), (found, _) in predict(gpu, problem).items():
        # One launch may be predicted in two parts, "kernel, part".
        for kernel, grouped in groupby(found, lambda part: part.name.split(",")[0]):
            if (str(case), kernel) not in measured:
                continue
            seconds, parts = measured[str(case), kernel], list(grouped)
            row = "kernels", problem.dtype, f"{case}: {kernel}"
            bytes_, operations = sum(part.distinct for part in parts), sum(part.flops for part in parts)
            yield Figure(*row, "of the copy's rate", "time", "%", 100 * bytes_ / seconds / bandwidth)
            yield Figure(*row, "of the matmul's rate", "time", "%", 100 * operations / seconds / flops)
            if known:
                predicted = sum(times(part, known)["predicted"] for part in parts)
                yield Figure(*row, "predicted", "time", "s", predicted)
                what = f"{row[-1]} takes at most {MOST_OF_PREDICTED} times what is predicted"
                detail = f"{seconds / predicted:.1f} times"
                yield Expectation(what, seconds - empty <= MOST_OF_PREDICTED * predicted, detail)


def peers(at: Place) -> Iterator[Item]:
    """Linear cross entropy in bfloat16: PyTorch's, liger-kernel's, cut-cross-entropy's, and ours with a single stripe,
    the fewest that it takes."""
    batch, channels, classes = (4, 8, 5) if at.is_dry else (256, 512, 200_000)
    draw = partial(torch.randn, device=at.device, dtype=torch.bfloat16)
    features, weight = draw(batch, channels).requires_grad_(), (draw(classes, channels) / 100).requires_grad_()
    labels = torch.arange(batch, device=at.device) % classes
    stripe = draw(batch, 1, channels), normalize(draw(1, classes, channels), dim=2)

    def ours() -> Tensor:
        return cge_kernels.revised_cross_entropy(features, weight, *stripe, labels, 0.0)[0].mean()

    def plain() -> Tensor:
        return cross_entropy((features @ weight.T).float(), labels)

    def liger() -> Callable[[], Tensor]:
        module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        return partial(module.LigerFusedLinearCrossEntropyLoss(), weight, features, labels)

    def cut() -> Callable[[], Tensor]:
        return partial(import_module("cut_cross_entropy").linear_cross_entropy, features, weight, labels)

    def step_of(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Any]:
        loss = make()
        return lambda: torch.autograd.grad(loss(), [features, weight])

    losses = {OURS: lambda: ours, "PyTorch": lambda: plain, "liger-kernel": liger, "cut-cross-entropy": cut}
    place = "linear cross entropy", f"B {batch}, C {channels}, bfloat16", f"N {classes:,}"
    with cge_kernels.backend("triton"):
        makers = {name: partial(step_of, make) for name, make in losses.items()}
        yield from compare(at, place, makers, "step")

"""The training step: how far it is to the first line of Triton, what it waits for, and what an epoch adds up."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import GPU, KERNEL_DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cge_fast
import cge_kernels
from cge_fast import CGELoss, ReidModel
from cge_fast.build import Run, capture
from cge_fast.data.augment import Augment
from cge_fast.losses.criterion import CriterionOutput, ReidCriterion
from cge_fast.losses.metric import CenterLoss, MetricLoss
from cge_fast.losses.softmax import SoftmaxLoss
from cge_fast.metrics import EpochMetrics
from cge_fast.optimizer import Average
from cge_fast.options import DataConfig, LossConfig, TrainConfig
from cge_fast.step import training_step
from cge_kernels import ClassShard

OURS = tuple(str(Path(package.__file__).parent) for package in (cge_fast, cge_kernels))
MOST_CALLS = 8


def make_run(device="cpu", classification=None, metric="triplet", optimizer=torch.optim.SGD, **options) -> Run:
    torch.manual_seed(0)
    device = torch.device(device)
    model = ReidModel(torch.nn.Conv2d(3, 8, 4, stride=4), channels=8).to(device)
    classification = classification or CGELoss(8, 4)
    criterion = ReidCriterion(classification, MetricLoss(metric), CenterLoss(4, 8), (1, 1, 0.1)).to(device)
    return Run(
        config=TrainConfig(loss=LossConfig(center_weight=0.1)),
        device=device,
        reid_set=None,
        sampler=None,
        loader=None,
        augment=None,
        num_classes=4,
        model=model,
        criterion=criterion,
        ddp_model=model,
        ddp_criterion=criterion,
        average=None,
        optimizer=optimizer([*model.parameters(), *criterion.parameters()], lr=1e-3, **options),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
    )


@pytest.fixture
def run() -> Run:
    return make_run(optimizer=torch.optim.Adam, fused=True)


def batch(device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(8, 3, 16, 8).to(device), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).to(device)


def step(run: Run, metrics: EpochMetrics | None = None, log_step: bool = False) -> None:
    metrics = metrics or EpochMetrics((1, 1, 0.1), 3, run.device)
    training_step(run, *batch(run.device), 0.5, metrics, log_step)


def calls_from_step() -> list[str]:
    """Our own functions from training_step, which is not counted, down to Launch.run, whose place the hook has here."""
    names, frame = ["run"], sys._getframe(2)
    while frame.f_code.co_name != "training_step":
        if frame.f_code.co_filename.startswith(OURS):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
        if frame is None:  # the backward, which autograd calls from a thread of its own on a GPU
            return names
    return names


def test_it_is_few_calls_to_the_first_line_of_triton():
    run, chains = make_run(KERNEL_DEVICE, optimizer=torch.optim.Adam, fused=True), {}

    def launched(launch):
        chains.setdefault(launch.kernel.__name__, calls_from_step())
        launch.run()

    with cge_kernels.backend("triton"), cge_kernels.launching(launched):
        step(run)
    assert len(chains) >= 6, "pooling, the loss forward and backward, the memory write"
    assert {name: len(calls) for name, calls in chains.items() if len(calls) > MOST_CALLS} == {}, chains


ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
H100 = cge_kernels.Target("cuda", 90, 32, multiprocessors=132, shared_bytes=227 * 1024)
NUMBERS_OR_SHAPES = ("local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique")


class Synchronisations(TorchDispatchMode):
    """Notes what would make the host wait for a GPU, whose tensors those on the device meta stand for.

    They have no numbers, so that to look at one is an error too, and code that asks for the device goes the GPU's way.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "cge_kernels":  # what the operators call is to be seen too
            with self:
                return function.redispatch(ON_CPU, *args, **kwargs)
        name = function.__name__.split(".")[0]
        if name.lstrip("_").startswith(NUMBERS_OR_SHAPES):
            self.found.append(name)
        if name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1:2])):
            self.found.append("a mask as index")
        result = function(*args, **kwargs)
        devices = {tensor.device.type for tensor in tensors((args, result))}
        if ("copy" in name and devices == {"cpu", "meta"}) or (name == "lift_fresh" and devices == {"meta"}):
            self.found.append("a copy from the host")  # from pageable memory; a loader's is pinned
        return result


def tensors(arguments) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, mask: x.sum().item(),
        lambda x, mask: x.tolist(),
        lambda x, mask: bool(mask.all()),
        lambda x, mask: x[mask],
        lambda x, mask: x.masked_select(mask),
        lambda x, mask: x.index_put_((mask,), x.sum()),
        lambda x, mask: mask.nonzero(),
        lambda x, mask: x.long().bincount(),
        lambda x, mask: x.unique(return_inverse=True),
        lambda x, mask: torch.tensor(1.0, device="meta"),
        lambda x, mask: torch.as_tensor(1.0, device="meta"),
        lambda x, mask: torch.as_tensor([2.0]).to(x.device),
        lambda x, mask: x.copy_(torch.ones(3)),
        lambda x, mask: x.cpu(),
    ],
)
def test_what_waits_for_a_gpu_is_seen(wait):
    x = torch.empty(3, device="meta")
    failed = None
    with Synchronisations() as mode:
        try:
            wait(x, x > 0)
        except RuntimeError as error:  # the device meta has no numbers
            failed = error
    assert mode.found or failed


@pytest.fixture
def meta(monkeypatch):
    """The kernels' names, which are launched as for a GPU, but do not run. The device meta has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    launched = []
    with cge_kernels.backend("triton"), cge_kernels.launching(lambda one: launched.append(one.kernel.__name__), H100):
        yield launched


@pytest.fixture
def two_ranks(monkeypatch):
    """This process is the first of two; nothing is sent, and no object may be, which would wait for a GPU."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    for name in ("all_gather", "all_reduce", "reduce_scatter"):
        monkeypatch.setattr(dist, name, lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "all_gather_object", None)


def waits_of_a_step(run: Run, pieces: int = 1) -> list[str]:
    run.config = replace(run.config, optim=replace(run.config.optim, accumulate=pieces))
    images, labels = batch(run.device)
    metrics = EpochMetrics((1, 1, 0.1), 3, run.device)
    with Synchronisations() as mode:
        training_step(run, images, labels, 0.5, metrics)
        training_step(run, images, labels, 0.5, metrics)
    return mode.found


@pytest.mark.parametrize("metric", ["triplet", "wrt", "instance"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_step_never_waits_for_the_device(meta, metric, pieces):
    assert waits_of_a_step(make_run("meta", CGELoss(8, 4, memory_dtype=torch.bfloat16), metric), pieces) == []
    assert {"stripe_pool_backward_kernel", "grad_logits_kernel", "write_memory_kernel"} <= set(meta)
    assert waits_of_a_step(make_run("meta", SoftmaxLoss(8, 4), metric), pieces) == []


def test_nor_do_clipping_and_the_average(meta):
    run = make_run("meta")
    run.config.optim.clip, run.average = 1.0, Average(run.model, 0.5)
    assert waits_of_a_step(run) == []


def test_nor_does_augmentation():
    augment = Augment(DataConfig(height=16, width=8)).to("meta")
    images, drawn = torch.empty(4, 16, 8, 3, dtype=torch.uint8), torch.empty(4, 7, dtype=torch.int64)
    with Synchronisations() as mode:
        assert augment(images.to("meta"), drawn.to("meta")).shape == (4, 3, 16, 8)
    assert mode.found == 2 * ["a copy from the host"], "of the batch itself, whose memory a loader pins"


@pytest.mark.parametrize("sharded", [False, True])
def test_nor_does_a_step_of_two_ranks(meta, two_ranks, monkeypatch, sharded):
    monkeypatch.setattr("cge_fast.losses.cge.require_equal", lambda **sizes: None)
    loss = CGELoss(8, 4, shard=ClassShard.of_rank(4, 0, 2) if sharded else None)
    assert waits_of_a_step(make_run("meta", loss)) == []


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_on_a_gpu_never_waits_for_it(dtype):
    run = make_run("cuda", CGELoss(8, 4, memory_dtype=dtype), optimizer=torch.optim.Adam, fused=True)
    images, labels = batch(run.device)
    metrics = EpochMetrics((1, 1, 0.1), 3, run.device)
    for mode in ("default", "error"):  # what is lazy is made in the first step
        torch.cuda.set_sync_debug_mode(mode)
        try:
            training_step(run, images, labels, 0.5, metrics)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert metrics.fold()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_network_trains_what_it_trains_without():
    plain, captured = (make_run("cuda", optimizer=torch.optim.Adam, fused=True) for _ in range(2))
    capture(captured.model, TrainConfig(DataConfig(height=16, width=8, identities=4, instances=2)))
    assert captured.model.neck.not_yet_tracked == 0
    for _ in range(3):
        wanted, found = plain.model.state_dict(), captured.model.state_dict()
        wanted.pop("neck.num_batches_tracked")  # the host counts, which runs nothing of a graph
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, msg=name)
        torch.manual_seed(1)
        step(plain)
        torch.manual_seed(1)
        step(captured)
    images, _ = batch("cuda")
    torch.testing.assert_close(captured.model.eval().embed(images[:3]), plain.model.eval().embed(images[:3]))


def test_metrics_wait_when_they_are_folded_alone():
    run, metrics = make_run(), EpochMetrics((1.0, 1.0, 0.1), 3, torch.device("cpu"))
    for log_step in (False, True):
        step(run, metrics, log_step)
    assert metrics.samples == 0
    assert len(metrics.fold()) == 2
    assert metrics.samples == 16
    assert metrics.fold() == []


def test_an_epoch_adds_up_what_its_steps_gave():
    metrics = EpochMetrics((1.0, 2.0, 0.5), 2, torch.device("cpu"))
    for samples, parts, correct, stripe_correct in (
        (2, [1.0, 2.0, 4.0], [True, False], [[True, False], [True, True]]),
        (1, [4.0, 5.0, 1.0], [True], [[False, False]]),
    ):
        out = CriterionOutput(torch.ones(()), torch.tensor(parts), torch.tensor(correct), torch.tensor(stripe_correct))
        metrics.update(out)
        metrics.update_weights(torch.tensor([0.5, 0.75]) * samples, samples)
        assert metrics.fold() == [1.0]
    row = metrics.row()
    assert [row[name] for name in ("classification", "metric", "center")] == [2, 3, 3]
    assert row["loss"] == 2 + 2 * 3 + 0.5 * 3
    assert row["train_accuracy"] == pytest.approx(2 / 3)
    assert row["stripe_precision"] == pytest.approx([2 / 3, 1 / 3])
    assert row["num_stripes_correct"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert (row["label_weight"], row["mean_weight"]) == (0.5, 0.75)
    without = EpochMetrics((1.0, 2.0, 0.5), 0, torch.device("cpu"))
    without.update(out._replace(stripe_correct=None))
    without.fold()
    assert without.row()["stripe_precision"] is without.row()["mean_weight"] is None


def test_the_step_trains_writes_the_memory_and_moves_the_centers(run):
    metrics = EpochMetrics((1.0, 1.0, 0.1), 3, run.device)
    weight, centers = run.criterion.classification.weight.clone(), run.criterion.center.centers.clone()
    step(run, metrics, log_step=True)
    assert len(metrics.fold()) == 1
    assert not torch.equal(run.criterion.classification.weight, weight)
    assert not torch.equal(run.criterion.center.centers, centers)
    torch.testing.assert_close(run.criterion.classification.memory.norm(dim=2), torch.ones(3, 4))
    assert metrics.counts[:2].tolist() == [8, 8]
    run.config = replace(run.config, optim=replace(run.config.optim, accumulate=2))
    step(run, metrics)
    assert len(metrics.fold()) == 2
    assert metrics.counts[:2].tolist() == [16, 8]

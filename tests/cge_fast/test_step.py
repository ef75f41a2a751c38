"""The training step: how far it is to the first line of Triton, what it waits for, and what an epoch adds up."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cge_fast
import cge_kernels
from cge_fast import CGELoss, ReidModel
from cge_fast.build import Run
from cge_fast.losses.criterion import CriterionOutput, ReidCriterion
from cge_fast.losses.metric import CenterLoss, MetricLoss
from cge_fast.metrics import EpochMetrics
from cge_fast.options import LossConfig, TrainConfig
from cge_fast.step import training_step

OURS = tuple(str(Path(package.__file__).parent) for package in (cge_fast, cge_kernels))
MOST_CALLS = 8


@pytest.fixture
def run() -> Run:
    torch.manual_seed(0)
    model = ReidModel(torch.nn.Conv2d(3, 8, 4, stride=4), channels=8)
    criterion = ReidCriterion(CGELoss(8, 4), MetricLoss(), CenterLoss(4, 8), (1, 1, 0.1))
    return Run(
        config=TrainConfig(loss=LossConfig(center_weight=0.1)),
        device=torch.device("cpu"),
        reid_set=None,
        sampler=None,
        loader=None,
        num_classes=4,
        model=model,
        criterion=criterion,
        ddp_model=model,
        ddp_criterion=criterion,
        optimizer=torch.optim.Adam([*model.parameters(), *criterion.parameters()], fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def step(run: Run, metrics: EpochMetrics | None = None, log_step: bool = False) -> torch.Tensor:
    images, labels = torch.rand(8, 3, 16, 8), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    return training_step(run, images, labels, 0.5, metrics or EpochMetrics((1, 1, 0.1), 3, run.device), log_step)


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


def test_it_is_few_calls_to_the_first_line_of_triton(run):
    chains = {}

    def launched(launch):
        chains.setdefault(launch.kernel.__name__, calls_from_step())
        launch.run()

    with cge_kernels.backend("triton"), cge_kernels.launching(launched):
        step(run)
    assert len(chains) >= 6, "pooling, the loss forward and backward, the memory write"
    assert {name: len(calls) for name, calls in chains.items() if len(calls) > MOST_CALLS} == {}, chains


class Synchronisations(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reads of a number, and new tensors from Python numbers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and function.__name__.split(".")[0] in WAITING:
            self.found.append(function.__name__.split(".")[0])
        return function(*args, **kwargs or {})


WAITING = {"_local_scalar_dense", "item", "bincount", "nonzero", "lift_fresh", "_to_copy", "is_nonzero", "unique"}


def test_metrics_are_updated_without_waiting_for_the_device():
    metrics = EpochMetrics((1.0, 1.0, 0.0), 3, torch.device("cpu"))
    out = CriterionOutput(torch.ones(()), torch.ones(3), torch.ones(4, dtype=torch.bool), torch.ones(4, 3) > 0)
    with Synchronisations() as mode:
        metrics.update(out)
        metrics.update_weights(torch.ones(2), 4)
    assert mode.found == []
    with Synchronisations() as mode:
        metrics.row()
    assert "_local_scalar_dense" in mode.found, "the mode sees what it is to see"


def test_an_epoch_adds_up_what_its_steps_gave():
    metrics = EpochMetrics((1.0, 2.0, 0.5), 2, torch.device("cpu"))
    for samples, parts, correct, stripe_correct in (
        (2, [1.0, 2.0, 4.0], [True, False], [[True, False], [True, True]]),
        (1, [4.0, 5.0, 1.0], [True], [[False, False]]),
    ):
        out = CriterionOutput(torch.ones(()), torch.tensor(parts), torch.tensor(correct), torch.tensor(stripe_correct))
        metrics.update(out)
        metrics.update_weights(torch.tensor([0.5, 0.75]) * samples, samples)
    row = metrics.row()
    assert [row[name] for name in ("classification", "metric", "center")] == [2, 3, 3]
    assert row["loss"] == 2 + 2 * 3 + 0.5 * 3
    assert row["train_accuracy"] == pytest.approx(2 / 3)
    assert row["stripe_precision"] == pytest.approx([2 / 3, 1 / 3])
    assert row["num_stripes_correct"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert (row["label_weight"], row["mean_weight"]) == (0.5, 0.75)
    without = EpochMetrics((1.0, 2.0, 0.5), 0, torch.device("cpu"))
    without.update(out._replace(stripe_correct=None))
    assert without.row()["stripe_precision"] is without.row()["mean_weight"] is None


def test_the_step_trains_writes_the_memory_and_moves_the_centers(run):
    metrics = EpochMetrics((1.0, 1.0, 0.1), 3, run.device)
    weight, centers = run.criterion.classification.weight.clone(), run.criterion.center.centers.clone()
    first = step(run, metrics, log_step=True)
    assert first.shape == (3,)
    assert not first.requires_grad
    assert not torch.equal(run.criterion.classification.weight, weight)
    assert not torch.equal(run.criterion.center.centers, centers)
    torch.testing.assert_close(run.criterion.classification.memory.norm(dim=2), torch.ones(3, 4))
    assert metrics.samples == metrics.log_step_samples == 8
    run.config = replace(run.config, optim=replace(run.config.optim, accumulate=2))
    step(run, metrics)
    assert metrics.samples == 16
    assert metrics.log_step_samples == 8

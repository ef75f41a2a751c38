"""Optimizers, the limit of the gradients' norm, the running average, and what is recomputed or compiled."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import assert_same_weights, run
from support import on_ranks
from torch import nn

from cge_fast import backbones, build, checkpoint, loop, train
from cge_fast.backbones.recompute import recompute_stages
from cge_fast.cli import read_settings
from cge_fast.compiled import missing_compiler
from cge_fast.distributed import rank
from cge_fast.metrics import EpochMetrics
from cge_fast.optimizer import Average, build_optimizer, clip_gradients
from cge_fast.options import OptimConfig
from cge_fast.step import training_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_an_optimizer_steps_as_its_equations_say(name):
    weight, gradient, config = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25]), OptimConfig(optimizer=name)
    config.lr, config.weight_decay = 0.1, 0.01
    parameter = nn.Parameter(weight.clone())
    optimizer, expected, velocity = build_optimizer(config, [parameter]), weight.clone(), torch.zeros(2)
    mean, square = torch.zeros(2), torch.zeros(2)
    for number in (1, 2, 3):
        parameter.grad = gradient.clone()
        optimizer.step()
        coupled = gradient if name == "adamw" else gradient + 0.01 * expected
        if name == "sgd":
            velocity = 0.9 * velocity + coupled
            expected = expected - 0.1 * velocity
            continue
        mean, square = 0.9 * mean + 0.1 * coupled, 0.999 * square + 0.001 * coupled**2
        expected = expected * (1 - 0.1 * 0.01) if name == "adamw" else expected
        corrected = mean / (1 - 0.9**number), (square / (1 - 0.999**number)).sqrt() + 1e-8
        expected = expected - 0.1 * corrected[0] / corrected[1]
    torch.testing.assert_close(parameter.detach(), expected)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.floats(1e-3, 1e3), st.integers(0, 3))
def test_gradients_keep_their_direction_and_have_the_norm_at_most(sizes, most, seed):
    random = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in [*sizes, 1]]
    for parameter in parameters:
        parameter.grad = 10 * torch.randn(len(parameter), generator=random)
    without_gradient = nn.Parameter(torch.zeros(2))
    before = torch.cat([parameter.grad for parameter in parameters])
    clip_gradients(torch.optim.SGD([*parameters, without_gradient]), most)
    after = torch.cat([parameter.grad for parameter in parameters])
    torch.testing.assert_close(after, before * min(1, most / before.norm().item()))


def clip_rows(rank_):
    """As one process that has all rows clips."""
    whole, shared = torch.arange(10.0).view(5, 2), torch.tensor([3.0, 4.0])
    alone, rows, same = (nn.Parameter(torch.zeros_like(t)) for t in (whole, whole[rank_ * 2 :][: 2 + rank_], shared))
    alone.grad, rows.grad, same.grad = whole.clone(), whole[rank_ * 2 :][: 2 + rank_].clone(), shared.clone()
    clip_gradients(torch.optim.SGD([rows, same]), 2.0, rows)
    both = nn.Parameter(torch.zeros(2))
    both.grad = shared.clone()
    nn.utils.clip_grad_norm_([alone, both], 2.0)
    torch.testing.assert_close(rows.grad, alone.grad[rank() * 2 :][: 2 + rank()])
    torch.testing.assert_close(same.grad, both.grad)


def test_the_norm_is_that_of_all_ranks_rows(tmp_path):
    on_ranks(2, clip_rows, folder=tmp_path)


def test_an_average_follows_weights_and_statistics():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    average, expected = Average(model, 0.75), {name: t.clone() for name, t in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        model(torch.randn(4, 3, 2, 2))
        average.update(model)
        expected = {n: 0.75 * t + 0.25 * model.state_dict()[n] for n, t in expected.items() if t.is_floating_point()}
    for name, tensor in expected.items():
        torch.testing.assert_close(average.module.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_what_is_deployed_is_the_average(options, tmp_path, capsys):
    assert run([*options, "--optim.ema", "0.5"], capsys)[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last"
    trained, deployed = checkpoint.load_training(last)["model"], checkpoint.load_model(last)
    assert trained.keys() == deployed.keys()
    different = {name for name, tensor in trained.items() if not torch.equal(tensor, deployed[name])}
    assert {"neck.weight", "neck.running_mean", "backbone.0.0.weight"} <= different


@pytest.mark.parametrize("begins_with", ["0", "0.9"])
def test_an_average_may_begin_or_end_when_a_run_goes_on(options, tmp_path, capsys, begins_with):
    assert run([*options, "--optim.ema", begins_with], capsys)[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last"
    before, deployed = checkpoint.load_training(last)["model"], checkpoint.load_model(last)
    config = replace(read_settings(last / "config.yaml"))
    config.optim.ema = 0.9 - float(begins_with)
    resumed = build.build_run(config, CPU)
    loop.resume(resumed)
    trained = before or deployed
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert (resumed.average is None) == (begins_with == "0.9")
    if resumed.average:
        assert torch.equal(resumed.average.module.neck.weight, deployed["neck.weight"])


@pytest.mark.parametrize("shards", [("false", "false"), ("true", "false"), ("true", "true")])
def test_sgds_momentum_is_in_a_checkpoint(options, tmp_path, shards):
    arguments = ["--optim.optimizer", "sgd", "--model.shard_classes", shards[0], "--model.shard_checkpoints", shards[1]]
    on_ranks(2, train_and_resume, [*options, "--optim.lr", "0.01", *arguments], folder=tmp_path)


def train_and_resume(rank_, arguments):
    config, _, _ = train.parse(arguments)
    one = build.build_run(config, CPU)
    loop.train(one)
    other = build.build_run(config, CPU)
    loop.resume(other)
    before, after = (made.optimizer.state_dict()["state"] for made in (one, other))
    assert before.keys() == after.keys()
    assert len(before) > 10
    for parameter, state in before.items():
        assert torch.equal(state["momentum_buffer"], after[parameter]["momentum_buffer"])


def test_another_optimizer_is_refused_when_a_run_goes_on(trained, capsys):
    status, _, err = run(
        ["--output", str(trained), "--resume", "--optim.epochs", "3", "--optim.optimizer", "sgd"], capsys
    )
    assert status == 2
    assert "optim.optimizer: sgd, but the run was trained with adam" in err


@pytest.mark.parametrize("name", ["compact", "resnet18", "resnet50_ibn_a"])
def test_recomputed_stages_have_the_same_gradients_and_statistics(name):
    torch.manual_seed(0)
    backbone = backbones.build(name, non_local="half" if name == "resnet18" else "none")
    images = torch.randn(2, 3, 64, 32)
    recomputed = deepcopy(backbone)
    recompute_stages(recomputed)
    calls = []
    block = next(module for module in recomputed.modules() if type(module).__name__ in ("BasicBlock", "Bottleneck"))
    block.conv1.register_forward_hook(lambda *_: calls.append(1))
    for network in (backbone, recomputed):
        for _ in range(2):
            network(images).square().mean().backward()
    assert len(calls) == 4, "twice in each step"
    for (which, parameter), other in zip(backbone.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), which
    for (which, buffer), other in zip(backbone.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(buffer, other), which
    assert torch.equal(backbone.eval()(images), recomputed.eval()(images))
    assert backbone.state_dict().keys() == recomputed.state_dict().keys()


@pytest.mark.usefixtures("same_bits")
def test_a_run_that_recomputes_is_the_same_run(options, tmp_path, capsys):
    for name, more in (("run", ()), ("other", ("--optim.checkpoint_backbone", "true", "--optim.accumulate", "2"))):
        accumulate = ("--optim.accumulate", "2") if not more else ()
        run([*options, *more, *accumulate, "--output", str(tmp_path / name), "--optim.ema", "0.9"], capsys)
    assert_same_weights(tmp_path / "run", tmp_path / "other")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_compiler()), reason="no compiler")
@pytest.mark.parametrize("cge", ["true", "false"])
def test_a_compiled_run_trains_what_it_trains_without(options, cge):
    runs = []
    for compiled in ("false", "true"):
        config, _, _ = train.parse([*options, "--optim.compile", compiled, "--model.cge", cge])
        runs.append(build.build_run(config, CPU))
    batches = [*runs[0].loader]
    losses = []
    for one in runs:
        metrics = EpochMetrics(config.loss.weights, 3 if cge == "true" else 0, CPU)
        for pixels, drawn, labels in batches:
            training_step(one, one.augment(pixels, drawn), labels, 0.5, metrics)
        losses.append(metrics.fold())
        assert all(name.count("_orig_mod") == 0 for name in one.model.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--optim.checkpoint_backbone", "true"), "optim.compile: must be false with optim.checkpoint_backbone"),
        ((), "optim.compile: must be false, torch.compile cannot run here (no compiler)"),
    ],
)
def test_where_nothing_can_be_compiled_one_line_says_so(options, capsys, monkeypatch, change, message):
    monkeypatch.setattr("cge_fast.compiled.missing_compiler", lambda: "no compiler")
    status, _, err = run([*options, "--optim.compile", "true", *change], capsys)
    assert status == 2
    assert message in err

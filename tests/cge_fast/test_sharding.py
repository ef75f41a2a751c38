"""Classes shared out among ranks: what one process computes, with memory for a part of it."""

import os
import subprocess
import sys
import time

import pytest
import torch
from support import RANKS_TIMEOUT, WITHOUT_GPU, on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cge_reference
from cge_fast import CGELoss, ReidModel, checkpoint, train
from cge_fast.build import build_run
from cge_fast.distributed import rank as own_rank
from cge_fast.distributed import require_equal, world_size
from cge_fast.errors import UserError
from cge_fast.loop import resume, save
from cge_fast.loop import train as train_run
from cge_fast.metrics import EpochMetrics
from cge_fast.step import training_step
from cge_kernels import ClassShard

CLASSES, BATCH, CHANNELS, STRIPES = 11, 12, 5, 3


def shard_here(classes=CLASSES) -> ClassShard:
    return ClassShard.of_rank(classes, own_rank(), world_size())


def own_samples() -> slice:
    return slice(own_rank() * BATCH // world_size(), (own_rank() + 1) * BATCH // world_size())


def problem():
    """Local features and labels of the whole batch; labels at the shards' edges."""
    local_features = torch.randn(BATCH, STRIPES, CHANNELS, generator=torch.Generator().manual_seed(0))
    return local_features, torch.tensor([0, 2, 3, 5, 6, 8, 9, 10, 10, 4, 7, 1])


def close(actual, expected):
    """Within 1e-5 of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def write_and_train(rank):
    written()
    five_steps()


def network(shard):
    """A model and a loss without BatchNorm, whose statistics would be those of one rank's share."""
    torch.manual_seed(3)
    loss = CGELoss(CHANNELS, CLASSES, classifier_std=1.0, shard=shard)
    model = ReidModel(nn.Conv2d(3, CHANNELS, 2, stride=2), CHANNELS)
    model.neck = nn.Identity()
    with torch.no_grad():
        shape = model.backbone.weight.shape
        model.backbone.weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(4)))
        model.backbone.bias.copy_(torch.arange(CHANNELS) / 10)
    return model, loss


def images():
    return torch.rand(BATCH, 3, 12, 4, generator=torch.Generator().manual_seed(5))


def train_five_steps(model, loss_of, own):
    _, labels = problem()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_of.parameters()], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        embeddings = model(images()[own])
        out = loss_of(embeddings, labels[own])
        (out.loss + out.loss**2).backward()
        optimizer.step()
        loss_of.write_memory(embeddings.stripes, labels[own], 0.5)
    return out.loss.detach()


def written():
    """The memory after a write has the rows of the one that one process writes, and so do the weights' means."""
    local_features, labels = problem()
    loss, own = CGELoss(CHANNELS, CLASSES, shard=shard_here()), own_samples()
    whole = torch.zeros(STRIPES, CLASSES, CHANNELS)
    for _ in range(2):
        loss.write_memory(local_features[own], labels[own], 0.5)
        cge_reference.write_memory_(whole, local_features, labels, 0.5)
    close(loss.memory, whole[:, shard_here().rows])
    weights = loss.label_and_mean_weight(local_features[own], labels[own]) * world_size()
    full = cge_reference.revise_logits(torch.ones(BATCH, CLASSES), local_features, whole)
    close(weights, torch.stack([full.gather(1, labels[:, None]).sum(), full.mean(dim=1).sum()]))


def five_steps():
    sharded, sharded_loss = network(shard_here())
    wrapped = DistributedDataParallel(sharded, broadcast_buffers=False)
    found = train_five_steps(wrapped, sharded_loss, own_samples())
    alone, loss = network(None)
    expected = train_five_steps(alone, loss, slice(None))
    close(found, expected)
    close(sharded.backbone.weight, alone.backbone.weight)
    close(sharded.backbone.bias, alone.backbone.bias)
    close(sharded_loss.weight, loss.weight[shard_here().rows])
    close(sharded_loss.memory, loss.memory[:, shard_here().rows])


@pytest.mark.parametrize("ranks", [1, 2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_memory_and_five_steps_equal_those_of_one_process(ranks, tmp_path):
    on_ranks(ranks, write_and_train, folder=tmp_path)


@pytest.mark.parametrize("classes", [4, 5, 11, 1000])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_every_class_has_one_rank_and_the_shares_differ_by_one_at_most(classes, ranks):
    shards = [ClassShard.of_rank(classes, number, ranks) for number in range(ranks)]
    assert [row for shard in shards for row in range(classes)[shard.rows]] == list(range(classes))
    assert max(shard.count for shard in shards) - min(shard.count for shard in shards) <= 1


def errors_on_every_rank(rank):
    with pytest.raises(ValueError, match="classes must be at least one for each rank, got 1 for 2 ranks"):
        shard_here(classes=1)
    for sizes, message in (
        ({"num_classes": 9 + rank}, "num_classes: must be the same on every rank, got 9, 10"),
        ({"in_channels": 4 + rank}, "in_channels: must be the same on every rank, got 4, 5"),
        ({"stripes": 2 + rank}, "stripes: must be the same on every rank, got 2, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            CGELoss(**{"in_channels": 4, "num_classes": 9, "shard": shard_here(classes=9)} | sizes)
    model, loss = network(shard_here())
    labels = torch.tensor([1, CLASSES if rank == 1 else 2])
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {CLASSES}\), got {CLASSES}"):
        loss(model(images()[:2]), labels)
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {CLASSES}\), got {CLASSES}"):
        loss.write_memory(torch.rand(2, STRIPES, CHANNELS), labels, 0.5)
    require_equal(classes=3)


def test_wrong_sizes_and_labels_are_errors_on_every_rank(tmp_path):
    start_time = time.monotonic()
    on_ranks(2, errors_on_every_rank, folder=tmp_path)
    assert time.monotonic() - start_time < RANKS_TIMEOUT


SHARDED = ("--model.shard_classes", "true")


def torchrun(ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | WITHOUT_GPU | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "cge_fast.train", *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def train_here(rank, arguments):
    config, resuming, _ = train.parse([str(argument) for argument in arguments])
    run = build_run(config, torch.device("cpu"))
    if resuming:
        resume(run)
    train_run(run)


def tensors_of(output) -> dict[str, torch.Tensor]:
    last = output / "checkpoints" / "last"
    return checkpoint.load_model(last) | checkpoint.load_loss(last)


@pytest.mark.slow
def test_torchrun_trains_shards_that_any_number_of_ranks_takes_up(options, tmp_path):
    done = torchrun(2, *options, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mAP") == 2, "one final line, of one rank"
    whole = tmp_path / "run"
    memory = tensors_of(whole)[checkpoint.MEMORY]
    assert memory.shape[:2] == (3, 4)
    assert memory.norm(dim=2).allclose(torch.ones(3, 4))
    # one more epoch: in one process, and in 4 of which each has one identity
    for ranks, name, more in ((1, "one", ()), (4, "four", ("--model.shard_checkpoints", "true"))):
        output = tmp_path / name
        subprocess.run(["cp", "-r", whole, output], check=True)
        arguments = ["--output", output, "--resume", "--optim.epochs", 3, *more]
        if ranks == 1:
            train_here(0, arguments)
        else:
            on_ranks(ranks, train_here, arguments, folder=output)
        assert checkpoint.load_training(output / "checkpoints" / "last")["epoch"] == 3
    last = tmp_path / "four" / "checkpoints" / "last"
    assert len([*(last / checkpoint.LOSS_FOLDER).glob("*.distcp")]) == 4
    assert not (last / checkpoint.LOSS).exists()
    # and of these files again in one
    train_here(0, ["--output", tmp_path / "four", "--resume", "--optim.epochs", 4])
    assert (last / checkpoint.LOSS).exists()
    assert not (last / checkpoint.LOSS_FOLDER).exists()
    assert tensors_of(tmp_path / "four").keys() == tensors_of(whole).keys()


def save_both(rank, folder, options):
    """A training's tensors and moments go through both kinds of checkpoint."""
    config, _, _ = train.parse([*options, *SHARDED, "--output", str(folder / "whole")])
    run = build_run(config, torch.device("cpu"))
    for pixels, drawn, labels in run.loader:
        training_step(run, run.augment(pixels, drawn), labels, 0.5, EpochMetrics(config.loss.weights, 3, run.device))
    for name in ("whole", "apart"):
        run.config.model.shard_checkpoints, run.config.output = name == "apart", folder / name
        save(run, is_best=False)


@pytest.mark.slow
def test_whole_and_sharded_checkpoints_hold_the_same(options, tmp_path):
    settings = ("--data.identities", "3", "--loss.metric_weight", "0", "--loss.center_weight", "0.01")
    on_ranks(3, save_both, tmp_path, [*options, *settings], folder=tmp_path)
    whole, apart = (tmp_path / name / "checkpoints" / "last" for name in ("whole", "apart"))
    assert not (apart.parent / checkpoint.STAGED).exists()
    assert len([*(apart / checkpoint.LOSS_FOLDER).glob("*.distcp")]) == 3
    assert checkpoint.identities(whole) == checkpoint.identities(apart) == 4
    loss, training = checkpoint.load_loss(whole), checkpoint.load_training(whole)
    assert loss[checkpoint.MEMORY].shape == (3, 4, 128)
    assert loss.keys() == {checkpoint.CLASSIFIER, checkpoint.MEMORY, "center.centers"}
    moments = next(state for state in training["optimizer"]["state"].values() if state["exp_avg"].shape == (4, 128))
    for shard in (None, ClassShard.of_rank(4, 0, 2), ClassShard.of_rank(4, 1, 2)):
        rows = shard.rows if shard else slice(None)
        expected = loss | {
            name: loss[name].movedim(checkpoint.AXES[name], 0)[rows] for name in loss.keys() & checkpoint.AXES.keys()
        }
        for folder, given in ((whole, moments), (apart, {})):
            found = checkpoint.load_loss(folder, shard)
            assert found.keys() == expected.keys()
            for name in found:
                assert found[name].movedim(checkpoint.AXES.get(name, 0), 0).equal(expected[name]), name
            loaded = checkpoint.load_moments(folder, given, shard)
            assert loaded.keys() == {"exp_avg", "exp_avg_sq"}
            assert all(loaded[name].equal(moments[name][rows]) for name in loaded)


def resume_other_classes(rank, arguments):
    with pytest.raises(UserError, match=r"data: checkpoint .*last has 4 classes, the data set 5"):
        train_here(rank, arguments)


def test_a_checkpoint_of_other_classes_is_an_error_on_every_rank(trained, market, tmp_path):
    for camera in (1, 2):
        copied = next((market / "bounding_box_train").glob("0001_*")).read_bytes()
        (market / "bounding_box_train" / f"0099_c{camera}s1_000000_01.png").write_bytes(copied)
    resumed = ["--output", trained, "--resume", "--optim.epochs", 3, *SHARDED]
    on_ranks(2, resume_other_classes, resumed, folder=tmp_path)

"""Classes shared out among ranks: what one process computes, with memory for a part of it."""

import os
import subprocess
import sys
import time

import pytest
import torch
from support import RANKS_TIMEOUT, on_ranks
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import cge_reference
from cge_fast import CGEHead, checkpoint, model, train
from cge_fast import loop as training
from cge_fast.distributed import require_equal, shard_of, sharded_cross_entropy, world_size
from cge_fast.errors import UserError
from cge_fast.losses.cge import draw_rows_

CLASSES, BATCH, CHANNELS, STRIPES = 11, 12, 5, 3


def problem():
    """Features, classifier, local features, memory and labels of the whole batch; labels at the shards' edges."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    memory = normalize(draw(STRIPES, CLASSES, CHANNELS), dim=2)
    memory[:, 4] = 0
    labels = torch.tensor([0, 2, 3, 5, 6, 8, 9, 10, 10, 4, 7, 1])
    return 3 * draw(BATCH, CHANNELS), draw(CLASSES, CHANNELS), draw(BATCH, STRIPES, CHANNELS), memory, labels


def truth(label_smoothing, local_gradient):
    """Loss, hits and gradients of the mean loss, of the reference in one process, float32."""
    features, weight, local_features, memory, labels = problem()
    leaves = [tensor.requires_grad_() for tensor in (features, weight, local_features)]
    loss, hit, local_hit = cge_reference.revised_cross_entropy(*leaves, memory, labels, label_smoothing, local_gradient)
    loss.mean().backward()
    return loss.detach(), hit, local_hit, [leaf.grad for leaf in leaves]


def close(actual, expected):
    """Within 1e-5 of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def losses_and_gradients(rank, label_smoothing, local_gradient):
    features, weight, local_features, memory, labels = problem()
    shard, ranks = shard_of(CLASSES), world_size()
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    leaves = [features[own], weight[shard.rows], local_features[own]]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    rows = memory[:, shard.rows].contiguous()
    loss, hit, local_hit = sharded_cross_entropy(*leaves, rows, labels[own], shard, label_smoothing, local_gradient)
    loss.mean().backward()
    true_loss, true_hit, true_local_hit, (grad_features, grad_weight, grad_local) = truth(
        label_smoothing, local_gradient
    )
    close(loss.detach(), true_loss)
    assert hit.equal(true_hit)
    assert local_hit.equal(true_local_hit)
    close(leaves[1].grad, grad_weight[shard.rows])
    # DistributedDataParallel averages what comes of these over the ranks afterwards.
    close(leaves[0].grad / ranks, grad_features[own])
    if local_gradient:
        close(leaves[2].grad / ranks, grad_local[own])
    else:
        assert leaves[2].grad is None


def all_combinations(rank):
    for label_smoothing in (0.0, 0.1):
        for local_gradient in (True, False):
            losses_and_gradients(rank, label_smoothing, local_gradient)
    written(rank)
    five_steps(rank)


def network(shard_classes):
    """A backbone and a head without BatchNorm, whose statistics would be those of one rank's share."""
    torch.manual_seed(3)
    head = CGEHead(CHANNELS, CLASSES, epochs=2, shard_classes=shard_classes, classifier_std=1.0)
    head.neck = nn.Identity()
    backbone = nn.Conv2d(3, CHANNELS, 2, stride=2)
    with torch.no_grad():
        backbone.weight.copy_(torch.randn(backbone.weight.shape, generator=torch.Generator().manual_seed(4)))
        backbone.bias.copy_(torch.arange(CHANNELS) / 10)
    return model.ReidModel(backbone, head)


def images():
    return torch.rand(BATCH, 3, 12, 4, generator=torch.Generator().manual_seed(5))


def train_five_steps(trained, wrapped, own):
    _, _, _, _, labels = problem()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        out = wrapped(images()[own], labels[own])
        (out.loss + out.loss**2).backward()
        optimizer.step()
        trained.head.write_memory(out.local_features, labels[own], 1)
    return out.loss.detach()


def written(rank):
    """The memory after a write has the rows of the one that one process writes, bit for bit."""
    _, _, local_features, _, labels = problem()
    head = CGEHead(CHANNELS, CLASSES, epochs=2, shard_classes=True)
    own = slice(rank * BATCH // world_size(), (rank + 1) * BATCH // world_size())
    for _ in range(2):
        head.write_memory(local_features[own], labels[own], 1)
    whole = torch.zeros(STRIPES, CLASSES, CHANNELS)
    for _ in range(2):
        cge_reference.write_memory_(whole, local_features, labels, momentum=0.5)
    close(head.memory, whole[:, shard_of(CLASSES).rows])
    weights = head.label_and_mean_weight(local_features[own], labels[own]) * world_size()
    full = cge_reference.revise_logits(torch.ones(BATCH, CLASSES), local_features, whole)
    if world_size() > 1:
        close(weights, torch.stack([full.gather(1, labels[:, None]).sum(), full.mean(dim=1).sum()]))


def five_steps(rank):
    sharded = network(shard_classes=True)
    own = slice(rank * BATCH // world_size(), (rank + 1) * BATCH // world_size())
    if world_size() > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(sharded, checkpoint.SHARDED)
    wrapped = DistributedDataParallel(sharded, broadcast_buffers=False)
    loss = train_five_steps(sharded, wrapped, own)
    alone = network(shard_classes=False)
    expected = train_five_steps(alone, alone, slice(None))
    close(loss, expected)
    close(sharded.backbone.weight, alone.backbone.weight)
    close(sharded.backbone.bias, alone.backbone.bias)
    rows = shard_of(CLASSES).rows
    close(sharded.head.classifier.weight, alone.head.classifier.weight[rows])
    close(sharded.head.memory, alone.head.memory[:, rows])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_loss_gradients_memory_and_five_steps_equal_those_of_one_process(ranks, tmp_path):
    on_ranks(ranks, all_combinations, folder=tmp_path)


@pytest.mark.parametrize("classes", [4, 5, 11, 1000])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_every_class_has_one_rank_and_the_shares_differ_by_one_at_most(classes, ranks):
    shards = [shard_of(classes, number, ranks) for number in range(ranks)]
    assert [row for shard in shards for row in range(classes)[shard.rows]] == list(range(classes))
    assert max(shard.count for shard in shards) - min(shard.count for shard in shards) <= 1


def test_the_ranks_draw_the_rows_that_one_process_draws():
    torch.manual_seed(1)
    whole = CGEHead(16, 2050, epochs=1).classifier.weight
    following = torch.rand(1)
    for number in range(3):
        shard = shard_of(2050, number, 3)
        torch.manual_seed(1)
        rows = torch.empty(shard.count, 16)
        draw_rows_(rows, shard, 0.001)
        assert torch.equal(rows, whole[shard.rows])
        assert torch.equal(torch.rand(1), following)


def errors_on_every_rank(rank):
    with pytest.raises(ValueError, match="shard_classes: 1 identities cannot be shared out among 2 ranks"):
        CGEHead(4, 1, epochs=1, shard_classes=True)
    for sizes, message in (
        ({"num_classes": 9 + rank}, "num_classes: must be the same on every rank, got 9, 10"),
        ({"in_channels": 4 + rank}, "in_channels: must be the same on every rank, got 4, 5"),
        ({"stripes": 2 + rank}, "stripes: must be the same on every rank, got 2, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            CGEHead(**{"in_channels": 4, "num_classes": 9, "epochs": 1, "shard_classes": True} | sizes)
    head = CGEHead(CHANNELS, CLASSES, epochs=1, shard_classes=True)
    labels = torch.tensor([1, CLASSES if rank == 1 else 2])
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {CLASSES}\), got {CLASSES}"):
        head(torch.rand(2, CHANNELS, 6, 2), labels)
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {CLASSES}\), got {CLASSES}"):
        head.write_memory(torch.rand(2, STRIPES, CHANNELS), labels, 1)
    require_equal(classes=3)


def test_wrong_sizes_and_labels_are_errors_on_every_rank(tmp_path):
    start_time = time.monotonic()
    on_ranks(2, errors_on_every_rank, folder=tmp_path)
    assert time.monotonic() - start_time < RANKS_TIMEOUT


@pytest.mark.parametrize(
    "change",
    [
        {"cge": False},
        {"revision": "none"},
        {"classification": "focal"},
        {"shuffle_memory": True},
        {"kernels": "reference"},
    ],
)
def test_what_cannot_be_sharded_is_said(change):
    with pytest.raises(ValueError, match=r"shard_classes needs cge, revision 'logits', .* got "):
        CGEHead(4, 3, epochs=1, shard_classes=True, **change)


def die_in_the_second_step(rank, folder):
    features, weight, local_features, memory, labels = problem()
    shard = shard_of(CLASSES)
    own = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    for step in range(2):
        leaf = features[own].clone().requires_grad_()
        arguments = leaf, weight[shard.rows], local_features[own], memory[:, shard.rows].contiguous(), labels[own]
        if step == 1 and rank == 1:
            os._exit(1)
        try:
            sharded_cross_entropy(*arguments, shard)[0].mean().backward()
        except RuntimeError as error:
            (folder / "error").write_text(str(error))
            raise


def test_a_rank_that_dies_in_mid_step_ends_the_others_with_an_error(tmp_path):
    start_time = time.monotonic()
    context = on_ranks(2, die_in_the_second_step, tmp_path, folder=tmp_path, join=False)
    for process in context.processes:
        process.join(RANKS_TIMEOUT)
    assert time.monotonic() - start_time < RANKS_TIMEOUT
    assert [process.exitcode for process in context.processes] == [1, 1]
    assert (tmp_path / "error").read_text()


def torchrun(ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "cge_fast.train", *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


SHARDED = ("--model.shard_classes", "true")


def train_here(rank, arguments):
    config, resume, _ = train.parse([str(argument) for argument in arguments])
    run = training.Training(config, torch.device("cpu"))
    if resume:
        run.resume()
    run.run()


def built_without_batch_norm(settings, *_):
    torch.manual_seed(3)
    head = CGEHead(8, 4, epochs=2, shard_classes=settings.shard_classes)
    head.neck = nn.Identity()
    return model.ReidModel(nn.Conv2d(3, 8, 8, stride=8), head)


def train_without_batch_norm(rank, arguments):
    training.model.build = built_without_batch_norm
    train_here(rank, arguments)


def test_two_ranks_train_what_one_process_trains_also_after_a_checkpoint(options, tmp_path, monkeypatch):
    options = [*options, *SHARDED, "--optim.lr", "0.001"]
    on_ranks(2, train_without_batch_norm, options, folder=tmp_path)
    monkeypatch.setattr(training.model, "build", built_without_batch_norm)
    train_here(0, [*options, "--output", tmp_path / "alone"])
    together, alone = weights_of(tmp_path / "run"), weights_of(tmp_path / "alone")
    assert together.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)


def weights_of(output):
    return checkpoint.load_weights(output / "checkpoints" / "last")


def test_torchrun_trains_shards_that_any_number_of_ranks_takes_up(options, tmp_path):
    done = torchrun(2, *options, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mAP") == 2, "one final line, of one rank"
    whole = tmp_path / "run"
    assert weights_of(whole)["head.memory"].shape[:2] == (3, 4)
    assert weights_of(whole)["head.memory"].norm(dim=2).allclose(torch.ones(3, 4))
    # one more epoch: in one process, and in 4 of which each has one identity
    for ranks, name, more in ((1, "one", ()), (4, "four", ("--model.shard_checkpoints", "true"))):
        output = tmp_path / name
        subprocess.run(["cp", "-r", whole, output], check=True)
        arguments = ["--output", output, "--resume", "--optim.epochs", 3, *more]
        if ranks == 1:
            train_here(0, arguments)
        else:
            (tmp_path / name / "store").unlink(missing_ok=True)
            on_ranks(ranks, train_here, arguments, folder=output)
        assert checkpoint.load_training(output / "checkpoints" / "last")["epoch"] == 3
    last = tmp_path / "four" / "checkpoints" / "last"
    assert len(checkpoint.find_rows(last)) == 4
    # and of these files again in one
    train_here(0, ["--output", tmp_path / "four", "--resume", "--optim.epochs", 4])
    assert checkpoint.find_rows(last) == []
    assert weights_of(tmp_path / "four").keys() == weights_of(whole).keys()


def tensors(rank, folder, options):
    """A training's weights and moments go through both kinds of checkpoint."""
    config, _, _ = train.parse([*options, *SHARDED, "--output", str(folder / "run")])
    run = training.Training(config, torch.device("cpu"))
    sums = training.EpochSums.zeros(3, torch.device("cpu"))
    for batch, labels in run.loader:
        run.step(run.network, batch, labels, 1, sums)
    for name in ("whole", "apart"):
        run.config.model.shard_checkpoints = name == "apart"
        run.checkpoints = folder / name
        run.save(is_best=False)


def test_whole_and_sharded_checkpoints_hold_the_same(options, tmp_path):
    on_ranks(3, tensors, tmp_path, [*options, "--data.identities", "3", "--loss.l2", "0"], folder=tmp_path)
    whole, apart = (tmp_path / name / "last" for name in ("whole", "apart"))
    assert not (tmp_path / "apart" / checkpoint.STAGED).exists()
    assert [(first, end) for first, end, _ in checkpoint.find_rows(apart)] == [(0, 2), (2, 3), (3, 4)]
    weights, training_state = checkpoint.load_weights(whole), checkpoint.load_training(whole)
    assert weights["head.memory"].shape == (3, 4, 128)
    moments = next(
        state for state in training_state["optimizer"]["state"].values() if state["exp_avg"].shape == (4, 128)
    )
    for shard in (None, shard_of(4, 0, 2), shard_of(4, 1, 2)):
        rows = shard.rows if shard else slice(None)
        expected = weights | {name: weights[name].movedim(axis, 0)[rows] for name, axis in checkpoint.SHARDED.items()}
        for folder in (whole, apart):
            found = checkpoint.load_weights(folder, shard)
            assert found.keys() == expected.keys()
            for name in found:
                assert found[name].movedim(checkpoint.SHARDED.get(name, 0), 0).equal(expected[name]), name
        for folder, given in ((whole, moments), (apart, {})):
            loaded = checkpoint.load_moments(folder, given, shard)
            assert all(loaded[name].equal(moments[name][rows]) for name in checkpoint.MOMENTS)


def resume_other_classes(rank, arguments):
    with pytest.raises(UserError, match=r"data: checkpoint .*last has 4 classes, the data set 5"):
        train_here(rank, arguments)


def test_a_checkpoint_of_other_classes_is_an_error_on_every_rank(options, tmp_path, market):
    train_here(0, options)
    for camera in (1, 2):
        copied = next((market / "bounding_box_train").glob("0001_*")).read_bytes()
        (market / "bounding_box_train" / f"0099_c{camera}s1_000000_01.png").write_bytes(copied)
    resumed = ["--output", tmp_path / "run", "--resume", "--optim.epochs", 3, *SHARDED]
    on_ranks(2, resume_other_classes, resumed, folder=tmp_path)

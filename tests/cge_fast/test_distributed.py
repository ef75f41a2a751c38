"""Two processes: what is gathered, and what a torchrun training keeps equal."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support import on_ranks
from torch import nn

from cge_fast import CGELoss, ReidModel, build, checkpoint, train
from cge_fast.distributed import gather, gather_with_gradient
from cge_fast.evaluation.features import embed
from cge_fast.loop import train as train_run
from cge_fast.losses.metric import batch_hard_triplet
from cge_reference import write_memory_

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def features() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def gather_uneven(rank):
    mine = torch.arange(3.0)[:, None] if rank == 0 else torch.full((1, 1), 9.0)
    assert gather(mine).flatten().tolist() == [0, 1, 2, 9]
    assert gather(torch.empty(0, 2)).shape == (0, 2)


def embed_fewer_images_than_ranks(rank, options):
    config, _, _ = train.parse(options)
    run = build.build_run(config, torch.device("cpu"))
    found = embed(run.model, run.reid_set.query[:1], config.data, config.evaluation, "query")
    assert found.shape == (1, 128)


def triplet_gradient(rank):
    mine = features()[rank * 3 : rank * 3 + 3].requires_grad_()
    batch_hard_triplet(gather_with_gradient(mine), LABELS, 0.3).backward()
    whole = features().requires_grad_()
    batch_hard_triplet(whole, LABELS, 0.3).backward()
    # DistributedDataParallel averages over the two ranks afterwards.
    torch.testing.assert_close(mine.grad / 2, whole.grad[rank * 3 : rank * 3 + 3])


def write_uneven(rank):
    local_features = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(2))
    mine = slice(0, 5) if rank == 0 else slice(5, 6)
    loss = CGELoss(4, 3)
    loss.write_memory(local_features[mine], LABELS[mine], 0.5)
    whole = write_memory_(torch.zeros(3, 3, 4), local_features, LABELS, 0.5)
    assert torch.equal(loss.memory, whole)


def on_two_ranks(rank, options):
    for function in (gather_uneven, triplet_gradient, write_uneven):
        function(rank)
    embed_fewer_images_than_ranks(rank, options)


def test_what_two_ranks_gather(options, tmp_path):
    on_ranks(2, on_two_ranks, options, folder=tmp_path)


class NoNorm(nn.Identity):
    """In BNNeck's place, whose statistics would be those of one rank's share."""

    num_features = 8


def model_without_batch_norm(*arguments) -> ReidModel:
    torch.manual_seed(3)
    model = ReidModel(nn.Conv2d(3, 8, 8, stride=8), channels=8)
    model.neck = NoNorm()
    return model


def train_without_batch_norm(rank, options):
    build.build_model = model_without_batch_norm
    config, _, _ = train.parse(options)
    train_run(build.build_run(config, torch.device("cpu")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--loss.center_weight", "0.01"],
        # The triplet loss is mined in a micro-batch, so that it is left out where micro-batches differ.
        ["--optim.accumulate", "2", "--loss.metric_weight", "0"],
        ["--model.shard_classes", "true"],
        ["--model.cge", "false"],
    ],
)
def test_two_ranks_train_what_one_process_trains(options, tmp_path, monkeypatch, settings):
    options = [*options, *settings, "--optim.lr", "0.001"]
    on_ranks(2, train_without_batch_norm, options, folder=tmp_path)
    monkeypatch.setattr(build, "build_model", model_without_batch_norm)
    train_without_batch_norm(0, [*options, "--output", str(tmp_path / "alone")])
    runs = (tmp_path / run / "checkpoints" / "last" for run in ("run", "alone"))
    together, alone = (load_file(last / checkpoint.MODEL) | load_file(last / checkpoint.LOSS) for last in runs)
    assert together.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torchrun_trains_and_resumes_and_its_checkpoint_holds_every_identity(options, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    last = tmp_path / "run" / "checkpoints" / "last"
    for epochs, settings in (
        (2, [*options, "--optim.accumulate", "2"]),
        (3, ["--output", tmp_path / "run", "--resume"]),
    ):
        arguments = ["-m", "cge_fast.train", *settings, "--optim.epochs", str(epochs)]
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("mAP") == 2, "one final line, of one rank"
        assert checkpoint.load_training(last)["epoch"] == epochs
    memory = checkpoint.load_loss(last)[checkpoint.MEMORY]
    torch.testing.assert_close(memory.norm(dim=2), torch.ones(3, 4))

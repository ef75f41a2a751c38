"""Two processes: what is gathered, and what a torchrun training keeps equal."""

import os
import subprocess
import sys

import pytest
import torch
from support import on_ranks
from torch import nn

from cge_fast import CGEHead, checkpoint, model, train
from cge_fast import loop as training
from cge_fast.distributed import gather, gather_with_gradient
from cge_fast.losses.triplet import batch_hard_triplet
from cge_fast.model import ReidModel
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
    run = training.Training(config, torch.device("cpu"))
    features = model.embed(run.network, run.reid_set.query[:1], config.data, config.evaluation, "query")
    assert features.shape == (1, 128)


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
    head = CGEHead(4, 3, epochs=2)
    head.write_memory(local_features[mine], LABELS[mine], 1)
    whole = write_memory_(torch.zeros(3, 3, 4), local_features, LABELS, momentum=0.5)
    assert torch.equal(head.memory, whole)


def network_without_batch_norm(*arguments) -> ReidModel:
    torch.manual_seed(3)
    head = CGEHead(8, 4, epochs=2)
    head.neck = nn.Identity()  # its statistics would be those of one rank's share
    return ReidModel(nn.Conv2d(3, 8, 8, stride=8), head)


def train_without_batch_norm(rank, options):
    training.model.build = network_without_batch_norm
    config, _, _ = train.parse(options)
    training.Training(config, torch.device("cpu")).run()


@pytest.mark.parametrize("function", [gather_uneven, triplet_gradient, write_uneven])
def test_on_two_ranks(function, tmp_path):
    on_ranks(2, function, folder=tmp_path)


def test_one_image_on_two_ranks(options, tmp_path):
    on_ranks(2, embed_fewer_images_than_ranks, options, folder=tmp_path)


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_ranks_train_what_one_process_trains(options, tmp_path, monkeypatch, accumulate):
    # The triplet loss is mined in a micro-batch, so that it is left out where micro-batches differ.
    options = [*options, "--optim.accumulate", accumulate, *(["--loss.l2", "0"] if accumulate == "2" else [])]
    options += ["--optim.lr", "0.001"]
    on_ranks(2, train_without_batch_norm, options, folder=tmp_path)
    monkeypatch.setattr(training.model, "build", network_without_batch_norm)
    train_without_batch_norm(0, [*options, "--output", str(tmp_path / "alone")])
    together, alone = (checkpoint.load_weights(tmp_path / run / "checkpoints" / "last") for run in ("run", "alone"))
    assert together.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)


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
    memory = checkpoint.load_weights(last)["head.memory"]
    torch.testing.assert_close(memory.norm(dim=2), torch.ones(3, 4))

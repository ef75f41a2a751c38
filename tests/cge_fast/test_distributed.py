"""Two processes: what is gathered, and what a torchrun training keeps equal."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support import WITHOUT_GPU, on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cge_fast import CGELoss, Embeddings, ReidModel, build, checkpoint, distributed, train
from cge_fast.data import batches
from cge_fast.distributed import copy_from_first_rank, every_rank_has_samples, gather_with_gradient
from cge_fast.evaluation.features import embed
from cge_fast.loop import train as train_run
from cge_fast.losses.metric import batch_hard_triplet
from cge_kernels import ClassShard
from cge_reference import write_memory_

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def features() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def embed_images_that_ranks_cannot_share_evenly(rank, options):
    config, _, _ = train.parse(options)
    run = build.build_run(config, torch.device("cpu"))
    run.model.eval()
    for images in (run.reid_set.gallery[:1], run.reid_set.gallery[:5]):
        found = embed(run.model, images, config.data, config.evaluation, "gallery")
        alone = run.model.embed(torch.cat([*batches.plain_batches(images, 1, config.data, run.device, "alone")]))
        torch.testing.assert_close(found, alone)


def triplet_gradient(rank):
    mine = features()[rank * 3 : rank * 3 + 3].requires_grad_()
    batch_hard_triplet(gather_with_gradient(mine), LABELS, 0.3).backward()
    whole = features().requires_grad_()
    batch_hard_triplet(whole, LABELS, 0.3).backward()
    # DistributedDataParallel averages over the two ranks afterwards.
    torch.testing.assert_close(mine.grad / 2, whole.grad[rank * 3 : rank * 3 + 3])


def written(rank):
    local_features = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(2))
    loss = CGELoss(4, 3, memory_dtype=torch.bfloat16)
    mine = slice(3 * rank, 3 * rank + 3)
    loss.write_memory(local_features[mine], LABELS[mine], 0.5)
    whole = write_memory_(torch.zeros(3, 3, 4), local_features, LABELS, 0.5)
    assert torch.equal(loss.memory, whole)
    loss.memory_read.fill_(rank)
    copy_from_first_rank(loss.buffers())
    assert (loss.memory_read == 0).all()
    with pytest.raises(ValueError, match="samples: must be the same on every rank, got 3, 2"):
        loss.write_memory(local_features[: 3 - rank], LABELS[: 3 - rank], 0.5)


class Sharded(nn.Module):
    """A network that has the sharded loss in it."""

    def __init__(self, rank: int):
        super().__init__()
        self.layer, self.loss = nn.Linear(4, 4), CGELoss(4, 4, stripes=1, shard=ClassShard.of_rank(4, rank, 2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return self.loss(Embeddings(x, x[:, None], x), labels).loss


def wrapped(rank):
    own = features()[rank * 3 : rank * 3 + 3], LABELS[rank * 3 : rank * 3 + 3]
    with pytest.raises(RuntimeError, match="wrap the network alone, and call the loss outside of it"):
        DistributedDataParallel(Sharded(rank))(*own)
    network = Sharded(rank)
    network.layer = DistributedDataParallel(network.layer)
    network(*own).backward()


def on_two_ranks(rank, options):
    for function in (triplet_gradient, written, wrapped):
        function(rank)
    embed_images_that_ranks_cannot_share_evenly(rank, options)


def test_what_two_ranks_gather(options, tmp_path):
    on_ranks(2, on_two_ranks, options, folder=tmp_path)


def test_sync_batch_norm_is_told_to_look_for_no_empty_rank_inside_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with every_rank_has_samples():
        assert not torch.cuda.is_current_stream_capturing(), "one rank has no SyncBatchNorm"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with every_rank_has_samples():
        assert torch.cuda.is_current_stream_capturing()
    assert not torch.cuda.is_current_stream_capturing()


class NoNorm(nn.Module):
    """In BNNeck's place, whose statistics would be those of one rank's share: its weight alone."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, pooled):
        return pooled * self.weight


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
        ["--optim.freeze_backbone", "1", "--optim.backbone_lr", "0.5"],
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
    environment = os.environ | WITHOUT_GPU | {"OMP_NUM_THREADS": "1"}
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

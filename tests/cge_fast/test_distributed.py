"""Two processes: what is gathered, and what a torchrun training keeps equal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from cge_fast import CGEHead, checkpoint
from cge_fast.distributed import gather, gather_with_gradient
from cge_fast.losses import batch_hard_triplet

LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def on_two_ranks(function, tmp_path):
    """Runs function(rank, folder) in two gloo processes."""
    processes.spawn(start, (function, str(tmp_path)), nprocs=2)


def start(rank, function, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    function(rank, Path(folder))
    dist.destroy_process_group()


def features() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def gather_uneven(rank, folder):
    mine = torch.arange(3.0)[:, None] if rank == 0 else torch.full((1, 1), 9.0)
    assert gather(mine).flatten().tolist() == [0, 1, 2, 9]
    assert len(gather(torch.empty(0, 2))) == 0


def triplet_gradient(rank, folder):
    mine = features()[rank * 3 : rank * 3 + 3].requires_grad_()
    batch_hard_triplet(gather_with_gradient(mine), LABELS, 0.3).backward()
    whole = features().requires_grad_()
    batch_hard_triplet(whole, LABELS, 0.3).backward()
    # DistributedDataParallel averages over the two ranks afterwards.
    torch.testing.assert_close(mine.grad / 2, whole.grad[rank * 3 : rank * 3 + 3])


def write_uneven(rank, folder):
    local_features = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(2))
    mine = slice(0, 5) if rank == 0 else slice(5, 6)
    head, whole = CGEHead(4, 3, epochs=2), CGEHead(4, 3, epochs=2)
    head.write_memory(local_features[mine], LABELS[mine], 1)
    torch.save(head.memory, folder / f"{rank}.pt")
    dist.destroy_process_group()
    whole.write_memory(local_features, LABELS, 1)
    assert torch.equal(head.memory, whole.memory)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)


@pytest.mark.parametrize("function", [gather_uneven, triplet_gradient, write_uneven])
def test_on_two_ranks(function, tmp_path):
    on_two_ranks(function, tmp_path)


def test_torchrun_trains_and_its_checkpoint_holds_every_identity(options, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["-m", "cge_fast.train", *options, "--optim.accumulate", "2"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mAP") == 2, "one final line, of one rank"
    memory = checkpoint.load_weights(tmp_path / "run" / "checkpoints" / "last")["head.memory"]
    torch.testing.assert_close(memory.norm(dim=2), torch.ones(3, 4))

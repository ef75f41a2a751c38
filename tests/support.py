"""Where the kernels' tests run, how far they may be from float64, and processes that are ranks of a group.

With a GPU the kernels run on it, compiled; without one, in Triton's interpreter on the CPU.
"""

import multiprocessing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

GPU = torch.cuda.is_available()
KERNEL_DEVICE = "cuda" if GPU else "cpu"

# Relative error of one rounding to a dtype: half a unit in the last place, but the interpreter cuts bfloat16 off.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-9 if GPU else 2.0**-7,
}


def assert_within(actual: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor | float) -> None:
    """Raises unless |actual - truth| <= bound, elementwise; nothing may be NaN."""
    actual = actual.detach().cpu().double()
    truth = truth.detach().cpu().double()
    assert actual.shape == truth.shape
    excess = (actual - truth).abs() - torch.as_tensor(bound, dtype=torch.float64)
    worst = excess.max().item() if excess.numel() else -1.0
    assert worst <= 0, f"exceeds its bound by {worst:.3g}; largest value {truth.abs().max().item():.3g}"


RANKS_TIMEOUT = 60  # seconds that a rank waits for the others


def on_ranks(ranks: int, function, *arguments, folder: Path, join: bool = True):
    """Runs function(rank, *arguments) in so many gloo processes, which meet in a file of the folder.

    They are forked from a process that has imported the package and nothing else, since to import it takes each longer
    than most tests.
    """
    multiprocessing.set_forkserver_preload(["cge_fast.loop"])
    arguments = ranks, function, arguments, str(folder)
    return processes.start_processes(start_rank, arguments, nprocs=ranks, join=join, start_method="forkserver")


def start_rank(rank, ranks, function, arguments, folder):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=RANKS_TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timeout)
    function(rank, *arguments)
    dist.destroy_process_group()

"""How the processes of a torchrun start and stop, and how they notice that one of them is gone."""

import ctypes
import itertools
import os
import queue
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cge_fast.distributed import barrier, rank, world_size
from cge_fast.errors import UserError, end_now

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # of prctl: the signal for the process whose parent dies
BEAT, MOST_MISSED = 3, 12  # seconds between two signs of life of a rank, and how many it may miss in a row
DEAD = "cge_fast/dead"  # key of the rank that missed more

_are_done = threading.Event()


def start_ranks() -> torch.device:
    """Joins the other processes if torchrun started this one; returns this process's device.

    Raises:
        UserError: the environment variables are not those of torchrun.
    """
    ranks, own, local = number("WORLD_SIZE", 1), number("RANK", 0), number("LOCAL_RANK", 0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"LOCAL_RANK: {local}, but each process needs one of {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if ranks > 1:
        if own >= ranks:
            raise UserError(f"RANK: must be below WORLD_SIZE, {ranks}, got {own}")
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may be killed without a word to its processes
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        except (ValueError, dist.DistError) as error:
            raise UserError(f"WORLD_SIZE: {ranks}, but the ranks cannot meet ({error}); use torchrun") from error
        _are_done.clear()
        threading.Thread(target=watch, args=(own, ranks), daemon=True).start()
    return device


def stop_ranks() -> None:
    """Leaves the other processes, once all have come here."""
    if dist.is_initialized():
        _are_done.set()
        barrier()
        dist.destroy_process_group()


def number(variable: str, default: int) -> int:
    """The value of an environment variable that torchrun sets."""
    value = os.environ.get(variable, str(default))
    if not value.isdecimal() or len(value) > 6 or (variable == "WORLD_SIZE" and int(value) == 0):
        raise UserError(f"{variable}: must be a number, as torchrun sets it, got {value!r}")
    return int(value)


def watch(own: int, ranks: int) -> None:
    """Ends this process if another one shows no sign of life: a collective would wait for it for an hour."""
    news: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=beat, args=(own, ranks, news), daemon=True).start()
    gone = ""
    while not gone:
        try:
            gone = news.get(timeout=BEAT * MOST_MISSED)
        except queue.Empty:  # the store's computer does not answer
            gone = "rank 0 or torchrun"
        if _are_done.is_set():
            return
    end_now(f"error: {gone} has ended, or cannot be reached", 2)


def beat(own: int, ranks: int, news: queue.SimpleQueue[str]) -> None:
    """Counts this rank's beats in torch's store, reads those of the next rank, and tells who is gone, or else "".

    Missed beats are counted, not timed, so that a computer that was asleep has not lost anybody.
    """
    watched, seen, missed, gone = (own + 1) % ranks, -1, 0, ""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, timeout=timedelta(seconds=30))
        for number_ in itertools.count():
            store.set(f"cge_fast/beat/{own}", str(number_))
            found = int(store.get(f"cge_fast/beat/{watched}")) if store.check([f"cge_fast/beat/{watched}"]) else -1
            seen, missed = found, missed + 1 if found == seen else 0
            if missed > MOST_MISSED:
                store.set(DEAD, str(watched))
            news.put(f"rank {int(store.get(DEAD))}" if store.check([DEAD]) else "")
            if _are_done.wait(BEAT):
                return news.put("")
    except (RuntimeError, KeyError, ValueError):  # the store went with the process that had it
        gone = "rank 0 or torchrun"
    return news.put(gone)


def from_first_rank(function: Callable[[], T]) -> T:
    """What the function gives on rank 0, on every rank; or the UserError or OSError that it raises there."""
    if world_size() == 1:
        return function()
    told: list[Any] = [None]
    if rank() == 0:
        try:
            told = [function()]
        except (UserError, OSError) as error:
            told = [error]
    dist.broadcast_object_list(told, 0)
    if isinstance(told[0], Exception):
        raise told[0]
    return told[0]

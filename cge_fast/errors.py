"""How programs end: one line on stderr for what the person at the keyboard can mend, and for signals."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from jsonargparse import ArgumentError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 15  # seconds that a computation may take to notice a signal; torchrun kills after 30
LONGEST = 2000  # characters of a message
# What torch says in a RuntimeError, and what that means. The first that is found counts.
KNOWN = (
    (
        r"shared memory|Bus error",
        "the shared memory /dev/shm is full: give --data.workers 0, or a container more of it (docker run --shm-size 8g)",
    ),
    (
        r"DataLoader worker \(pid",
        "a process that loads images has died ({}); if memory was short: fewer --data.workers",
    ),
    (r"can't allocate memory|out of memory|MemoryError", "not enough memory ({}): give smaller batches or images"),
    (
        r"gloo|NCCL|TCPStore|Connection (closed|reset)|[Bb]roken pipe",
        "another rank has ended, or cannot be reached ({})",
    ),
)


class UserError(Exception):
    """Wrong input from outside (a file, a folder, an option): the message names it and says what is wanted."""


_received: list[signal.Signals] = []  # since `run` began
_program = ""
_is_ending, _has_said = threading.Event(), threading.Event()  # once it is ending, further signals change nothing


def _in_child() -> None:
    """A loader's process leaves Ctrl-C and a closed terminal to the process that it works for."""
    if signal.getsignal(signal.SIGTERM) is _receive:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)


def _receive(number: int, frame: object) -> None:
    _received.append(signal.Signals(number))
    if not _is_ending.is_set():
        _is_ending.set()
        raise KeyboardInterrupt


def one_line(error: BaseException | str) -> str:
    """The message on one line, without control characters and the traceback that a loader's process puts around it."""
    message = str(error)
    if "Original Traceback" in message:
        begin, _, rest = message.partition("Caught ")
        *_, message = (begin + rest).strip().splitlines()
        message = begin + message.partition(": ")[2]
    message = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(message.split()))
    return message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."


def ending(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status that a program ends with; None for a defect, whose traceback is wanted."""
    last = next((line for line in reversed(str(error).splitlines()) if line.strip()), "out of memory")
    status = 2
    if _received or isinstance(error, KeyboardInterrupt):
        number = _received[0] if _received else signal.SIGINT
        message, status = f"interrupted by {number.name}", 128 + number
    elif isinstance(error, UserError | ArgumentError):
        message = f"error: {str(error).strip()}"
    elif isinstance(error, OSError) and error.errno is not None:
        message = f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error.strerror}"
    elif isinstance(error, RuntimeError | MemoryError):
        known = (text for pattern, text in KNOWN if re.search(pattern, f"{type(error).__name__} {error}"))
        if not (meaning := next(known, "")):
            return None
        message = "error: " + meaning.format(last)
    else:
        return None
    return one_line("; ".join([message, *getattr(error, "__notes__", ())])), status


def is_first_rank_to_say() -> bool:
    """Whether none of the other processes that torchrun started has printed how it ends."""
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return True
    with suppress(Exception):  # the store has gone with torchrun
        import torch.distributed as dist

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, timeout=timedelta(seconds=5))
        return store.add(f"cge_fast/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    return True


def end_children() -> None:
    """Kills the processes that load images."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for each
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def say(message: str) -> None:
    """Prints how the program ends, once, and not if another rank has."""
    if not _has_said.is_set() and is_first_rank_to_say():
        print(f"{_program}: {message}", file=sys.stderr, flush=True)
    _has_said.set()


def end_now(message: str, status: int) -> None:
    """Ends the program from another thread than the main one, which may be waiting for what does not come."""
    if _is_ending.wait(5):  # then it has noticed, and has time to end by itself
        time.sleep(5)
    say(message)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; a computation that does not notice is ended."""
    _received.clear()
    _is_ending.clear()
    _has_said.clear()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    chosen = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # as nohup has it
    read, written = os.pipe()
    os.set_blocking(written, False)
    wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] in chosen and not over.wait(GRACE):
                end_now(f"interrupted by {signal.Signals(number[0]).name}", 128 + number[0])
        os.close(read)

    threading.Thread(target=watch, daemon=True).start()
    try:
        for number in chosen:
            signal.signal(number, _receive)
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number in chosen:
            signal.signal(number, before[number])
        os.close(written)


def run(main: Callable[[], None], program: str) -> None:
    """Runs a program: what a person can mend ends it with one line and status 2, a signal with 128 and its number."""
    global _program
    _program = program
    with signals_raise():
        try:
            main()
        except SystemExit:
            raise
        except BaseException as error:
            _is_ending.set()
            if not isinstance(error, UserError):  # a signal to all processes may have ended another one first
                time.sleep(0.2)
            end = ending(error)
            end_children()
            if end is None:
                raise
            message, status = end
            say(message)
            raise SystemExit(status) from None

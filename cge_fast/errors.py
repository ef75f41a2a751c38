"""How programs end: one line on stderr for what the person at the keyboard can mend, and for signals."""

import io
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
from typing import Any

from jsonargparse import ArgumentError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 15  # seconds that a computation may take to notice a signal; torchrun kills after 30
LONGEST = 2000  # characters of a message
# What torch says in a RuntimeError, and what that means. The first that is found counts.
KNOWN = (
    (r"shared memory|Bus error", "/dev/shm is full: set --data.workers 0, or give a container more by --shm-size 8g"),
    (r"DataLoader worker \(pid", "a process that loads images has died ({}); if memory is short, set --data.workers 0"),
    (r"can't allocate memory|out of memory|MemoryError", "not enough memory ({}): give smaller batches or images"),
    (r"gloo|NCCL|TCPStore|Connection (closed|reset)", "another rank has ended, or cannot be reached"),
)


class UserError(Exception):
    """Wrong input from outside (a file, a folder, an option): the message names it and says what is wanted."""


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey, like control characters in the name of a file."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def notice(line: str) -> None:
    """Says on stderr, in one line, what the person at the keyboard should know; of several ranks the first alone."""
    if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
        from cge_fast.progress import say

        say(printable(line))


_program = ""
_received: list[signal.Signals] = []  # since `run` began
_is_ending, _has_said = threading.Event(), threading.Event()


def _receive(number: int, frame: object) -> None:
    _received.append(signal.Signals(number))
    if not _is_ending.is_set():
        end_children()
        raise KeyboardInterrupt


def take_time_to_end() -> None:
    """A signal that has come is not repeated from now on: what the program still has to do is not interrupted."""
    if _received:
        _is_ending.set()


def _in_child() -> None:
    """A loader's process leaves Ctrl-C, a closed terminal and what there is to say to the process that it works for."""
    if signal.getsignal(signal.SIGTERM) is _receive:
        sys.stderr = io.StringIO()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)


def one_line(error: BaseException | str) -> str:
    """The message on one line, without control characters and the traceback that a loader's process puts around it."""
    message = str(error)
    if "Original Traceback" in message:
        begin, _, rest = message.partition("Caught ")
        *_, message = (begin + rest).strip().splitlines()
        message = begin + message.partition(": ")[2]
    message = printable(" ".join(message.split()))
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
    elif isinstance(error, ConnectionError | EOFError):  # of the queue that images come by
        message = f"error: {KNOWN[1][1].format(error)}"
    elif isinstance(error, OSError) and error.errno is not None:
        message = f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error.strerror}"
    elif isinstance(error, RuntimeError | MemoryError):
        known = (text for pattern, text in KNOWN if re.search(pattern, f"{type(error).__name__} {error}"))
        if not (meaning := next(known, "")):
            return None
        message = "error: " + meaning.format(last)
    else:
        return None
    notes: list[str] = []
    cause: BaseException | None = error
    while cause and not notes:
        notes, cause = getattr(cause, "__notes__", []), cause.__context__
    return one_line("; ".join([message, *notes])), status


def is_first_rank_to_say() -> bool:
    """Whether none of the other processes that torchrun started has printed how it ends."""
    if not os.environ.get("TORCHELASTIC_RUN_ID"):
        return True
    with suppress(Exception):  # the store has gone with torchrun
        import torch.distributed as dist

        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, timeout=timedelta(seconds=5))
        return store.add(f"cge_fast/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    return os.environ.get("RANK") == "0"


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
    print(file=sys.stderr)  # after the progress bar
    say(message)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; a program that does not notice is ended."""
    for event in (_received, _is_ending, _has_said):
        event.clear()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    chosen = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # as nohup has it
    read, written = os.pipe()
    os.set_blocking(written, False)
    wakeup, unraisable = signal.set_wakeup_fd(written, warn_on_full_buffer=False), sys.unraisablehook
    over, main_thread = threading.Event(), threading.get_ident()
    start_method = multiprocessing.get_start_method(allow_none=True)

    def watch() -> None:
        """A computation may take long, and an exception in a destructor is lost: the signal is repeated."""
        while not (number := os.read(read, 1)) or number[0] not in chosen:
            if not number:
                return os.close(read)
        for _ in range(GRACE):
            if over.wait(1):
                return os.close(read)
            if not _is_ending.is_set():
                signal.pthread_kill(main_thread, number[0])
        return end_now(f"interrupted by {signal.Signals(number[0]).name}", 128 + number[0])

    def swallow(lost: Any) -> None:
        if not _received and "DataLoader worker" not in str(lost.exc_value):
            unraisable(lost)

    threading.Thread(target=watch, daemon=True).start()
    try:
        for number in chosen:
            signal.signal(number, _receive)
        sys.unraisablehook = swallow
        multiprocessing.set_start_method("fork", force=True)  # _in_child is for processes that are forked from this one
        yield
    finally:
        over.set()
        multiprocessing.set_start_method(start_method, force=True)
        sys.unraisablehook = unraisable
        signal.set_wakeup_fd(wakeup)
        for number in chosen:
            signal.signal(number, before[number])
        os.close(written)


def error_of(main: Callable[[], None]) -> BaseException | None:
    """What `main` raises but SystemExit."""
    try:
        try:
            main()
        finally:  # what comes from now on, in another handler of a signal, is not the error
            _is_ending.set()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except SystemExit:
        raise
    except BaseException as error:
        return error
    return None


def run(main: Callable[[], None], program: str) -> None:
    """Runs a program: what a person can mend ends it with one line and status 2, a signal with 128 and its number."""
    global _program
    _program = program
    with signals_raise():
        error = error_of(main)
        if error is None:
            return
        if not isinstance(error, UserError):
            time.sleep(0.2)  # a signal to all processes may have ended another one first
        end = ending(error)
        end_children()
        if end is None:
            raise error
        message, status = end
        say(message)
        if os.environ.get("WORLD_SIZE", "1") != "1":  # gloo's threads would end in an abort
            sys.stdout.flush()
            os._exit(status)
        raise SystemExit(status) from None

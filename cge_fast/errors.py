"""Errors that the person at the keyboard can mend: one line on stderr, exit status 2."""

import os
import sys
from collections.abc import Callable

from jsonargparse import ArgumentError


class UserError(Exception):
    """Wrong input from outside (a file, a folder, an option): the message names it and says what is wanted."""


def printable(text: str) -> str:
    """The text with escapes for what a terminal would obey, like control characters in the name of a file."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def notice(line: str) -> None:
    """Says on stderr, in one line, what the person at the keyboard should know; of several ranks the first alone."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr)


def one_line(error: Exception) -> str:
    """The error's message on one line, without the traceback that a data loader's worker process puts around it."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.rpartition(f"{UserError.__name__}: ")[2]
    return printable(" ".join(message.split()))


def run(main: Callable[[], None], program: str) -> None:
    """Runs a program: wrong input, options or files end it with one line and status 2, Ctrl-C with status 130."""
    try:
        main()
    except (UserError, ArgumentError) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.filename is None:  # not about a file that the user named: a defect of the program
            raise
        print(f"{program}: error: {printable(str(error.filename))}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None

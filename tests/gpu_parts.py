"""Parts for `python -m bench gpu`, where the process that it starts for each finds them."""

import subprocess
import sys

from bench.cases import OURS
from bench.gpu.checks import Expectation
from bench.results import Figure

FIGURE = Figure("steps", "tiny", "head", OURS, "step", "s", 2e-3)
HOLDER = """
import fcntl, time
held = open("held", "w")
fcntl.flock(held, fcntl.LOCK_EX)
print(flush=True)
time.sleep(600)
"""


def fine(at):
    yield FIGURE
    yield Expectation("it is fine", True)


def broken(at):
    yield Expectation("it cannot be tried", None, "no network")
    raise RuntimeError("the kernel\nfailed")


def hangs_with_another(at):
    """Starts a process that locks the file "held"."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE) as another:
        another.stdout.readline()
        yield FIGURE
        another.wait()

"""The host's time of a step of every operator, in turns with eager PyTorch; no time is asserted."""

import os
import subprocess
import sys

import pytest
from support import GPU

from bench.cases import CASES
from bench.host import PLACES
from bench.results import read


@pytest.mark.slow
def test_every_case_is_timed_and_where_the_time_goes_is_told(tmp_path):
    command = [sys.executable, "-m", "bench", "host", "--rounds", "2", "--csv", tmp_path / "results.csv"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert GPU or "a driver that does nothing" in done.stdout
    figures = read(tmp_path / "results.csv")
    steps = [figure for figure in figures if figure.bench == "host"]
    assert [(figure.subject, figure.contender) for figure in steps] == [
        (str(case), contender) for case in CASES for contender in ("cge_kernels", "eager")
    ]
    assert all(0 < figure.low <= figure.value <= figure.high for figure in steps)
    places = {figure.quantity: figure.value for figure in figures if figure.bench != "host"}
    assert places.keys() == {*PLACES, "PyTorch's C++"}
    assert sum(places.values()) == pytest.approx(1)

"""pytest bench/: a step of each operator and of the head in pytest-benchmark, which can save and compare runs.

--benchmark-autosave and --benchmark-compare do; CGE_BENCH_SHAPE names the shape ("msmt17"). `python -m bench operators`
has more: contenders there take turns, so that whatever else the machine does falls on all of them.
"""

import os

import pytest
import torch

from bench.cases import CASES, COMPILED, EAGER, OURS, Case, contenders
from bench.measure import default_device
from bench.shapes import SHAPES
from cge_fast.compiled import missing_compiler


@pytest.mark.parametrize("contender", [OURS, EAGER, COMPILED])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case: Case, contender: str, benchmark) -> None:
    if contender == COMPILED and missing_compiler():
        pytest.skip(f"torch.compile cannot run here: {missing_compiler()}")
    name, device = os.environ.get("CGE_BENCH_SHAPE", "msmt17"), default_device()
    compared = contenders(case, SHAPES[name], torch.float32, device, contender == COMPILED)[contender]

    def step() -> None:
        result = compared.forward()
        if compared.backward:
            compared.backward(result)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{name}: {case}"
    benchmark(step)

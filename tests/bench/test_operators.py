"""`pytest bench/` measures every operator in every direction, at a tiny shape, and shows what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.cases import CASES, COMPILED, EAGER, OURS, Case, compare, contenders
from bench.compiler import missing_compiler
from bench.measure import run
from bench.shapes import SHAPES
from bench.test_operators import Recording

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_runs_with_equal_results(case):
    compared = contenders(case, SHAPES["tiny"], torch.float32, CPU, with_compiled=False)
    assert list(compared) == [OURS, EAGER]
    for contender in compared.values():
        assert ("backward" in run(contender, CPU)) == case.has_backward
    if case.operator in ("stripe_pool", "revise_logits", "revise_logits_one_pass"):
        torch.testing.assert_close(compared[OURS].forward(), compared[EAGER].forward())


@pytest.mark.skipif(bool(missing_compiler()), reason="no compiler")
def test_the_compiled_reference_is_the_reference():
    compared = contenders(Case("revise_logits"), SHAPES["tiny"], torch.float32, CPU)
    torch.testing.assert_close(compared[COMPILED].forward(), compared[EAGER].forward())
    assert set(run(compared[COMPILED], CPU)) == {"forward", "backward", "step"}


def test_a_recording_plays_the_durations():
    clock = Recording([0.5, 0.25])
    assert [-(clock() - clock()) for _ in range(2)] == [0.5, 0.25]


def pytest_bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "bench/", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_suite_shows_and_saves_what_was_measured(tmp_path):
    file = tmp_path / "saved.json"
    done = pytest_bench(
        *("--shapes", "tiny", "--rounds", "2", "-k", "write_memory_ and not compile", f"--benchmark-json={file}")
    )
    assert done.returncode == 0, done.stdout
    saved = json.loads(file.read_text())["benchmarks"]
    assert [bench["group"] for bench in saved] == ["tiny: write_memory_, forward"] * 2
    for bench in saved:
        assert bench["stats"]["rounds"] == 2
        assert bench["stats"]["min"] <= bench["extra_info"]["20%"] <= bench["stats"]["median"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "huge"], f"shapes: must be of {', '.join(SHAPES)}, got 'huge'"),
        (["--dtype", "int8"], "dtype: must be of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_wrong_options_are_named(arguments, named):
    done = pytest_bench(*arguments)
    assert done.returncode != 0
    assert named in done.stdout + done.stderr


def test_without_a_compiler_the_column_is_left_out(monkeypatch):
    monkeypatch.setattr("bench.cases.missing_compiler", lambda: "no C++ compiler")
    found = compare(Case("write_memory_"), SHAPES["tiny"], torch.float32, rounds=1, seconds=0.0)
    assert list(found) == [OURS, EAGER]

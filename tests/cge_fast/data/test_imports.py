"""Whoever reads or counts images waits for neither PyTorch nor what trains with it."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "triton", "cge_kernels", "tensorboard", "pytorch_metric_learning", "matplotlib")
PROGRAM = """
import runpy, sys
import cge_fast.data
sys.argv = ["cge_fast.data", *sys.argv[1:]]
try:
    runpy.run_module("cge_fast.data", run_name="__main__")
except SystemExit as exit_:
    print("exit", exit_.code)
print("imported:", *(module for module in {heavy} if module in sys.modules))
"""


@pytest.mark.parametrize("counts", [False, True])
def test_the_program_imports_nothing_heavy(market, tmp_path, counts):
    arguments = ["market1501", "--root", str(market), "--sheet", str(tmp_path / "sheet.png")] if counts else ["--help"]
    command = [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ("published" if counts else "usage:") in printed
    assert printed.splitlines()[-1] == "imported:"

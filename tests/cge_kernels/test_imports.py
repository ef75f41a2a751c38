"""What importing cge_kernels and cge_reference brings with it: nothing that torch, or triton, does not."""

import subprocess
import sys

import pytest

IMPORT_ONE_AFTER_THE_OTHER = """
import sys
for names in ("torch", "cge_reference", "triton", "cge_kernels"):
    before = set(sys.modules)
    __import__(names)
    print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


@pytest.mark.slow
def test_cge_reference_needs_torch_alone_and_cge_kernels_torch_and_triton():
    command = [sys.executable, "-c", IMPORT_ONE_AFTER_THE_OTHER]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    torch, reference, triton, kernels = (set(line.split()) for line in finished.stdout.splitlines())
    assert "torch" in torch
    assert "triton" in triton
    assert reference - torch - sys.stdlib_module_names == {"cge_reference"}
    assert kernels - torch - triton - sys.stdlib_module_names == {"cge_kernels"}

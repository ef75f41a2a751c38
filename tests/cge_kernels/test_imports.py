"""What importing cge_kernels and cge_reference brings with it: nothing that torch, or triton, does not."""

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    """Top-level modules, but for the standard library's, that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(finished.stdout.split()) - sys.stdlib_module_names


@pytest.mark.parametrize(("package", "needs"), [("cge_kernels", "torch, triton"), ("cge_reference", "torch")])
def test_a_package_needs_nothing_else(package, needs):
    assert loaded_by(f"import {package}") - loaded_by(f"import {needs}") == {package}

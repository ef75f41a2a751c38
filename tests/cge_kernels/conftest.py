"""Backends that a test runs on, and poison in all memory that an operator leaves unwritten."""

import pytest
import torch
from support import KERNEL_DEVICE

import cge_kernels


@pytest.fixture(params=["triton", "cpu"])
def backend(request):
    """Runs the test on each backend of our own, and says which."""
    with cge_kernels.backend(request.param):
        yield request.param


@pytest.fixture(params=["triton", "cpu", "reference"])
def any_backend(request):
    """Runs the test on every backend, and says which."""
    with cge_kernels.backend(request.param):
        yield request.param


@pytest.fixture(params=["256", "0"], ids=["kept", "in chunks"])
def scratch(request, monkeypatch):
    """The scratch budget: what the forward keeps for the backward, or classes in the smallest chunks."""
    monkeypatch.setenv("CGE_SCRATCH_MB", request.param)


@pytest.fixture(autouse=True)
def poison():
    """torch.empty and its relatives give NaN: an output that is not wholly overwritten fails its parity test.

    A warning is enough where an operation is not deterministic: on a GPU the reference's pooling has no such gradient.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    for device in {"cpu", KERNEL_DEVICE}:
        assert torch.empty(1, device=device).isnan()
        assert torch.zeros(1, device=device).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])

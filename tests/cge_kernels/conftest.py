"""Poisons all memory that an operator leaves unwritten."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison():
    """torch.empty and its relatives give NaN: an output that is not wholly overwritten fails its parity test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    assert torch.zeros(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)

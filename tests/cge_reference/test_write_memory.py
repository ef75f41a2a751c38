"""write_memory_ against a loop over identities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cge_reference import write_memory_


def written_by_hand(memory, local_features, labels, momentum):
    memory = memory.clone()
    for y in set(labels.tolist()):
        for i in range(memory.shape[0]):
            mean = torch.stack([local_features[b, i] for b in range(len(labels)) if labels[b] == y]).mean(dim=0)
            if mean.norm() == 0:
                continue
            update = mean / mean.norm()
            old = memory[i, y]
            blended = update if old.norm() == 0 else momentum * old + (1 - momentum) * update
            memory[i, y] = blended / blended.norm()
    return memory


def example(batch=5, stripes=2, classes=4, channels=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    memory = normalize(torch.randn(stripes, classes, channels, dtype=torch.float64, generator=random), dim=2)
    memory[:, 0] = 0  # never seen
    local_features = torch.randn(batch, stripes, channels, dtype=torch.float64, generator=random)
    return memory, local_features, torch.randint(classes, (batch,), generator=random)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(0, 7), momentum=st.sampled_from([0.0, 0.01, 0.5, 1.0]), seed=st.integers(0, 99))
def test_rows_move_towards_the_normalised_mean_of_their_instances(batch, momentum, seed):
    memory, local_features, labels = example(batch, seed=seed)
    expected = written_by_hand(memory, local_features, labels, momentum)
    assert write_memory_(memory, local_features, labels, momentum) is memory
    torch.testing.assert_close(memory, expected)
    norms = memory.norm(dim=2)
    assert ((norms - 1).abs() < 1e-12).logical_or(norms == 0).all()


def test_the_low_precision_memory_is_the_rounded_memory_in_the_written_rows_only():
    memory, local_features, labels = example()
    memory = memory.float()
    low_precision_memory = torch.full_like(memory, 7, dtype=torch.bfloat16)
    write_memory_(memory, local_features, labels, 0.3, low_precision_memory)
    written = torch.zeros(4, dtype=torch.bool).index_fill(0, labels, True)
    assert torch.equal(low_precision_memory[:, written], memory[:, written].bfloat16())
    assert (low_precision_memory[:, ~written] == 7).all()


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_label_out_of_range_writes_nothing(wrong):
    memory, local_features, labels = example()
    expected = write_memory_(memory.clone(), local_features[1:], labels[1:], 0.5)
    labels[0] = wrong
    assert torch.equal(write_memory_(memory, local_features, labels, 0.5), expected)

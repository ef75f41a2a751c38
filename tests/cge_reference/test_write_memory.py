"""write_memory_ against a loop over identities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cge_reference import write_memory_


def written_by_hand(memory, local_features, labels, alpha):
    memory = memory.clone()
    for y in set(labels.tolist()):
        for i in range(memory.shape[0]):
            mean = torch.stack([local_features[b, i] for b in range(len(labels)) if labels[b] == y]).mean(dim=0)
            if mean.norm() == 0:
                continue
            update = mean / mean.norm()
            old = memory[i, y]
            blended = update if old.norm() == 0 else alpha * old + (1 - alpha) * update
            memory[i, y] = blended / blended.norm()
    return memory


def example(batch=5, stripes=2, classes=4, channels=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    memory = normalize(torch.randn(stripes, classes, channels, dtype=torch.float64, generator=random), dim=2)
    memory[:, 0] = 0  # never seen
    local_features = torch.randn(batch, stripes, channels, dtype=torch.float64, generator=random)
    return memory, local_features, torch.randint(classes, (batch,), generator=random)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(0, 7), alpha=st.sampled_from([0.0, 0.01, 0.5, 1.0]), seed=st.integers(0, 99))
def test_rows_move_towards_the_normalised_mean_of_their_instances(batch, alpha, seed):
    memory, local_features, labels = example(batch, seed=seed)
    expected = written_by_hand(memory, local_features, labels, alpha)
    assert write_memory_(memory, local_features, labels, alpha) is memory
    torch.testing.assert_close(memory, expected)
    norms = memory.norm(dim=2)
    assert ((norms - 1).abs() < 1e-12).logical_or(norms == 0).all()


@pytest.mark.parametrize("alpha", [1.0, torch.tensor(1.0)])
def test_a_row_never_seen_is_taken_whole_even_with_alpha_one(alpha):
    memory = torch.zeros(1, 2, 2)
    write_memory_(memory, torch.tensor([[[3.0, 4.0]]]), torch.tensor([1]), alpha)
    torch.testing.assert_close(memory, torch.tensor([[[0.0, 0.0], [0.6, 0.8]]]))


def test_with_alpha_one_a_row_seen_before_stays():
    memory, local_features, labels = example()
    labels = labels.clamp(min=1)
    before = memory.clone()
    write_memory_(memory, local_features, labels, 1.0)
    torch.testing.assert_close(memory, before)


def test_instances_that_cancel_leave_the_row_as_it_is():
    memory = torch.tensor([[[0.6, 0.8]]])
    write_memory_(memory, torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]]), torch.tensor([0, 0]), 0.5)
    assert torch.equal(memory, torch.tensor([[[0.6, 0.8]]]))


@pytest.mark.parametrize("size", [1e-14, 1e-25, 0.0])
def test_a_feature_too_small_to_have_a_direction_leaves_the_row_as_it_is(size):
    memory = torch.zeros(1, 1, 3)
    write_memory_(memory, torch.full((1, 1, 3), size), torch.tensor([0]), 0.5)
    assert (memory == 0).all()


def test_identities_outside_the_batch_stay_untouched():
    memory, local_features, _ = example()
    before = memory.clone()
    write_memory_(memory, local_features, torch.full((5,), 2), 0.1)
    assert torch.equal(memory[:, [0, 1, 3]], before[:, [0, 1, 3]])


def test_the_shadow_is_the_rounded_memory_in_the_written_rows_only():
    memory, local_features, labels = example()
    memory = memory.float()
    shadow = torch.full_like(memory, 7, dtype=torch.bfloat16)
    write_memory_(memory, local_features, labels, 0.3, shadow)
    written = torch.zeros(4, dtype=torch.bool).index_fill(0, labels, True)
    assert torch.equal(shadow[:, written], memory[:, written].bfloat16())
    assert (shadow[:, ~written] == 7).all()


def test_no_graph_is_kept():
    memory, local_features, labels = example()
    write_memory_(memory, local_features.requires_grad_(), labels, 0.5)
    assert not memory.requires_grad


def test_wrong_arguments_are_named_and_nothing_is_written():
    memory, local_features, labels = example()
    before = memory.clone()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), got 4"):
        write_memory_(memory, local_features, torch.tensor([0, 1, 2, 3, 4]), 0.5)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        write_memory_(memory, local_features, labels, 1.5)
    with pytest.raises(ValueError, match="memory must be contiguous, got strides"):
        write_memory_(memory.transpose(0, 1).contiguous().transpose(0, 1), local_features, labels, 0.5)
    with pytest.raises(ValueError, match=r"local_features must have shape \(5, 2, 3\)"):
        write_memory_(memory, local_features[:, :1], labels, 0.5)
    with pytest.raises(TypeError, match="memory must be float32 or float64"):
        write_memory_(memory.bfloat16(), local_features, labels, 0.5)
    with pytest.raises(ValueError, match="low_precision_memory must have shape"):
        write_memory_(memory, local_features, labels, 0.5, memory[:, :2])
    assert torch.equal(memory, before)

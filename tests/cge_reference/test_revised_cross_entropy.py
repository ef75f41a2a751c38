"""revised_cross_entropy against loops over its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cge_reference import revise_logits, revised_cross_entropy


def example(batch=4, classes=5, channels=3, stripes=2, dtype=torch.float64):
    random = torch.Generator().manual_seed(batch * 100 + classes)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=random).to(dtype)

    memory = normalize(draw(stripes, classes, channels), dim=2)
    labels = torch.randint(classes, (batch,), generator=random)
    return draw(batch, channels), draw(classes, channels), draw(batch, stripes, channels), memory, labels


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 4), classes=st.integers(1, 6), smoothing=st.sampled_from([0.0, 0.1, 1.0]))
def test_the_loss_is_the_cross_entropy_of_the_smoothed_target(batch, classes, smoothing):
    features, weight, local_features, memory, labels = example(batch, classes)
    loss, correct, _ = revised_cross_entropy(features, weight, local_features, memory, labels, smoothing)
    revised = revise_logits(features @ weight.T, local_features, memory).tolist()
    for b in range(batch):
        log_sum = math.log(sum(math.exp(p) for p in revised[b]))
        expected = 0.0
        for k in range(classes):
            target = (1 - smoothing) * (k == labels[b].item()) + smoothing / classes
            expected -= target * (revised[b][k] - log_sum)
        assert loss[b].item() == pytest.approx(expected, abs=1e-12)
        assert correct[b].item() == (max(range(classes), key=lambda k, b=b: revised[b][k]) == labels[b].item())


def test_stripe_correct_is_those_of_each_stripe_alone():
    features, weight, _, memory, labels = example()
    local_features = torch.stack([memory[0, labels], memory[1, (labels + 1) % 5]], dim=1)
    _, _, stripe_correct = revised_cross_entropy(features, weight, local_features, memory, labels)
    assert stripe_correct.tolist() == [[True, False]] * 4


def test_gradients_with_an_uneven_upstream_gradient():
    features, weight, local_features, memory, labels = example()
    bias = torch.randn(5, dtype=torch.float64)
    upstream = torch.rand(4, dtype=torch.float64)

    def weighted_loss(features, weight, local_features, bias):
        return (revised_cross_entropy(features, weight, local_features, memory, labels, bias=bias)[0] * upstream).sum()

    inputs = [tensor.requires_grad_() for tensor in (features, weight, local_features, bias)]
    assert torch.autograd.gradcheck(weighted_loss, inputs)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    features, weight, local_features, memory, labels = example(dtype=torch.float32)
    loss, _, _ = revised_cross_entropy(features * 1e4, weight, local_features, memory, labels)
    assert loss.isfinite().all()
    exact, _, _ = revised_cross_entropy(
        (features * 1e4).double(), weight.double(), local_features.double(), memory.double(), labels
    )
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-2)


def test_the_loss_is_float32_for_small_dtypes_and_gradients_have_their_inputs_dtype():
    features, weight, local_features, memory, labels = example(dtype=torch.float32)
    features = features.bfloat16().requires_grad_()
    weight.requires_grad_()
    loss, _, _ = revised_cross_entropy(features, weight, local_features, memory.bfloat16(), labels)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert features.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("wrong", [-1, 5])
def test_a_label_out_of_range_has_no_loss_and_nothing_correct(wrong):
    features, weight, local_features, memory, labels = example()
    labels[1] = wrong
    loss, correct, stripe_correct = revised_cross_entropy(features, weight, local_features, memory, labels)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert not correct[1]
    assert not stripe_correct[1].any()

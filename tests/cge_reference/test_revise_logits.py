"""revise_logits and revise_logits_one_pass against loops and the gradient formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from cge_reference import revise_logits, revise_logits_one_pass, stripe_pool


def example(batch=3, stripes=2, classes=5, channels=4, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, dtype=torch.float64, generator=random)
    local_features = torch.randn(batch, stripes, channels, dtype=torch.float64, generator=random)
    memory = normalize(torch.randn(stripes, classes, channels, dtype=torch.float64, generator=random), dim=2)
    return logits.to(dtype), local_features.to(dtype), memory.to(dtype)


def weight_by_hand(local_features, memory, b, k) -> float:
    product = 1.0
    stripes = memory.shape[0]
    for i in range(stripes):
        f = local_features[b, i].tolist()
        dot = sum(x * m for x, m in zip(f, memory[i, k].tolist(), strict=True))
        score = dot / max(math.sqrt(sum(x * x for x in f)), 1e-12)
        product *= 1 / (1 + math.exp(-score))
    return product ** (1 / stripes)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), stripes=st.integers(1, 5), classes=st.integers(1, 7), channels=st.integers(1, 5))
def test_each_logit_is_multiplied_by_the_nth_root_of_the_sigmoids(batch, stripes, classes, channels):
    logits, local_features, memory = example(batch, stripes, classes, channels)
    revised = revise_logits(logits, local_features, memory)
    for b in range(batch):
        for k in range(classes):
            expected = logits[b, k].item() * weight_by_hand(local_features, memory, b, k)
            assert revised[b, k].item() == pytest.approx(expected, rel=1e-12)


def test_a_class_never_seen_has_weight_one_half():
    logits, local_features, memory = example()
    memory[:, 2] = 0
    torch.testing.assert_close(revise_logits(logits, local_features, memory)[:, 2], logits[:, 2] / 2)


def test_a_zero_feature_has_weight_one_half_everywhere():
    logits, local_features, memory = example()
    revised = revise_logits(logits, torch.zeros_like(local_features), memory)
    torch.testing.assert_close(revised, logits / 2)


def test_the_length_of_a_feature_does_not_matter():
    logits, local_features, memory = example()
    longer = revise_logits(logits, local_features * 1e6, memory)
    torch.testing.assert_close(longer, revise_logits(logits, local_features, memory))


def test_gradients_are_those_of_finite_differences_and_of_the_formulas():
    logits, local_features, memory = example()
    logits.requires_grad_()
    local_features.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, f: revise_logits(p, f, memory), (logits, local_features))
    upstream = torch.randn_like(logits)
    grad_logits, grad_local = torch.autograd.grad(
        revise_logits(logits, local_features, memory), (logits, local_features), upstream
    )
    norm = local_features.detach().norm(dim=2, keepdim=True)
    unit = local_features.detach() / norm
    scores = torch.einsum("bic,ikc->bik", unit, memory)
    weights = scores.sigmoid().prod(dim=1) ** (1 / 2)
    torch.testing.assert_close(grad_logits, upstream * weights)
    grad_scores = (upstream * logits.detach() * weights)[:, None] * (1 - scores.sigmoid()) / 2
    grad_unit = torch.einsum("bik,ikc->bic", grad_scores, memory)
    through_norm = (grad_unit - unit * (grad_unit * unit).sum(dim=2, keepdim=True)) / norm
    torch.testing.assert_close(grad_local, through_norm)


def test_without_local_gradient_the_values_stay_and_the_weights_are_constants():
    logits, local_features, memory = example()
    logits.requires_grad_()
    local_features.requires_grad_()
    revised = revise_logits(logits, local_features, memory, local_gradient=False)
    assert torch.equal(revised, revise_logits(logits, local_features, memory))
    revised.sum().backward()
    assert local_features.grad is None
    torch.testing.assert_close(logits.grad * logits.detach(), revised.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_revised_logits_have_the_logits_dtype(dtype):
    logits, local_features, memory = example(dtype=torch.float32)
    revised = revise_logits(logits.to(dtype), local_features, memory)
    assert revised.dtype == dtype
    exact = revise_logits(logits.to(dtype).double(), local_features.double(), memory.double())
    torch.testing.assert_close(revised.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_a_bfloat16_memory_rounds_the_operands_and_nothing_else():
    logits, local_features, memory = example(dtype=torch.float32)
    rounded = memory.bfloat16()
    revised = revise_logits(logits, local_features, rounded)
    norm = local_features.double().norm(dim=2)
    scores = torch.einsum("bic,ikc->bik", local_features.bfloat16().double(), rounded.double()) / norm[:, :, None]
    torch.testing.assert_close(
        revised.double(), logits.double() * scores.sigmoid().prod(dim=1).sqrt(), rtol=1e-6, atol=0
    )


def test_one_pass_is_pooling_then_revision():
    feature_map = torch.rand(3, 4, 5, 2, dtype=torch.float64)
    logits, _, memory = example()
    revised, local_features = revise_logits_one_pass(feature_map, logits, memory, p=3.0)
    _, expected = stripe_pool(feature_map, 2, 3.0)
    assert torch.equal(local_features, expected)
    assert torch.equal(revised, revise_logits(logits, expected, memory))

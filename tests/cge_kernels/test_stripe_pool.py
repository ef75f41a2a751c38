"""The stripe_pool kernels against cge_reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import KERNEL_DEVICE, ROUNDING, assert_within

import cge_kernels
import cge_reference

FLOAT32 = ROUNDING[torch.float32]
# Sums of at most 64 numbers in a thread and between threads: so many roundings at most lie on the way of each number.
DEPTH = 70
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced"]


def draw_map(shape, dtype, layout, low=0.0, seed=0):
    """A map (B, C, H, W) of numbers in low..1 that lies in memory as `layout` says."""
    random = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    if layout == "transposed":
        shape = (batch, channels, width, height)
    if layout == "sliced":
        shape = (batch, channels, 2 * height, width + 1)
    x = (low + (1 - low) * torch.rand(shape, generator=random)).to(dtype).to(KERNEL_DEVICE)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3)
    return x[:, :, ::2, 1:] if layout == "sliced" else x


def check_parity(feature_map, stripes, p):
    """Values, gradient of the map and of p, with uneven upstream gradients, within bounds derived below."""
    ours = feature_map.detach().requires_grad_()
    truth = feature_map.detach().double().requires_grad_()
    our_p = None if p is None else torch.tensor(p, device=KERNEL_DEVICE, requires_grad=True)
    true_p = None if p is None else torch.tensor(p, device=KERNEL_DEVICE, dtype=torch.float64, requires_grad=True)
    with cge_kernels.backend("triton"):
        features = cge_kernels.stripe_pool(ours, stripes, our_p)
        random = torch.Generator().manual_seed(1)
        upstream = [torch.randn(f.shape, generator=random).to(KERNEL_DEVICE) for f in features]
        torch.autograd.backward(features, upstream)
    true_features = cge_reference.stripe_pool(truth, stripes, true_p)
    torch.autograd.backward(true_features, [u.double() for u in upstream])
    # exp2(p * log2(x)) is off by p * |log2 x| roundings and a few; x is at least 1e-6 = 2^-20.
    power = 0 if p is None else 20 * p + 8
    magnitude = cge_reference.stripe_pool(truth.detach().abs() if p is None else truth.detach(), stripes, p)
    for feature, true_feature, size in zip(features, true_features, magnitude, strict=True):
        assert feature.dtype == torch.float32
        assert_within(feature, true_feature, (DEPTH + power) * FLOAT32 * size)
    # The same with absolute gradients bounds the size of the terms, which may cancel in their sum.
    sizes = truth.detach().clone().requires_grad_()
    size_features = cge_reference.stripe_pool(sizes, stripes, p)
    torch.autograd.backward(size_features, [u.abs().double() for u in upstream])
    bound = (DEPTH + 2 * power) * FLOAT32 * sizes.grad.abs() + ROUNDING[feature_map.dtype] * truth.grad.abs()
    bound += torch.finfo(feature_map.dtype).smallest_normal * torch.finfo(feature_map.dtype).eps  # subnormal numbers
    assert ours.grad.dtype == feature_map.dtype
    assert_within(ours.grad, truth.grad, bound)
    if p is not None:
        positive = truth.detach().clamp(min=1e-6)
        terms = (positive * sizes.grad.abs() * 20).sum() / p
        assert_within(our_p.grad, true_p.grad, (DEPTH + 2 * power) * FLOAT32 * terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [None, 3.0])
def test_values_and_gradients_in_every_layout(dtype, layout, p):
    check_parity(draw_map((2, 5, 7, 3), dtype, layout, low=-0.2), 3, p)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), p=st.sampled_from([None, 1.0, 2.7]))
def test_odd_sizes(data, p):
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 7, 17]))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    stripes = data.draw(st.integers(1, height))
    check_parity(
        draw_map((batch, channels, height, width), torch.float32, data.draw(st.sampled_from(LAYOUTS))), stripes, p
    )


def test_the_papers_map_in_a_small_batch():
    check_parity(draw_map((1, 20, 24, 8), torch.bfloat16, "contiguous"), 3, 3.0)
    check_parity(draw_map((1, 70, 24, 8), torch.bfloat16, "channels_last"), 5, None)


@pytest.mark.parametrize("p", [None, 3.0])
def test_one_of_the_gradients_may_be_missing(p):
    feature_map = draw_map((2, 3, 5, 2), torch.float32, "contiguous")
    for index in (0, 1):
        ours, truth = feature_map.clone().requires_grad_(), feature_map.double().requires_grad_()
        with cge_kernels.backend("triton"):
            cge_kernels.stripe_pool(ours, 2, p)[index].square().sum().backward()
        cge_reference.stripe_pool(truth, 2, p)[index].square().sum().backward()
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=200 * FLOAT32, atol=1e-7)


@pytest.mark.parametrize("p", [3.0, 8.0, 30.0])
def test_a_dead_channel_has_finite_gradients_for_any_exponent(p):
    feature_map = draw_map((1, 2, 4, 2), torch.float32, "contiguous")
    feature_map[:, 0] = 0
    feature_map.requires_grad_()
    exponent = torch.tensor(p, device=KERNEL_DEVICE, requires_grad=True)
    with cge_kernels.backend("triton"):
        global_feature, local_features = cge_kernels.stripe_pool(feature_map, 2, exponent)
        (global_feature.sum() + local_features.sum()).backward()
    assert exponent.grad.isfinite()
    assert feature_map.grad.isfinite().all()
    assert (feature_map.grad[:, 0] == 0).all()


def test_activations_below_eps_get_no_gradient():
    feature_map = torch.tensor([[[[-5.0, 2.0]]]], device=KERNEL_DEVICE, requires_grad=True)
    with cge_kernels.backend("triton"):
        cge_kernels.stripe_pool(feature_map, 1, 2.0)[0].sum().backward()
    assert feature_map.grad[0, 0, 0, 0] == 0
    assert feature_map.grad[0, 0, 0, 1] > 0


@pytest.mark.parametrize("p", [None, 3.0])
def test_nan_in_the_map_reaches_exactly_the_features_that_contain_it(p):
    feature_map = draw_map((2, 3, 4, 2), torch.float32, "contiguous")
    feature_map[1, 2, 3, 0] = torch.nan
    with cge_kernels.backend("triton"):
        global_feature, local_features = cge_kernels.stripe_pool(feature_map, 2, p)
    assert global_feature.isnan().nonzero().tolist() == [[1, 2]]
    assert local_features.isnan().nonzero().tolist() == [[1, 1, 2]]


def test_an_empty_batch():
    feature_map = torch.empty(0, 3, 4, 5, device=KERNEL_DEVICE, requires_grad=True)
    with cge_kernels.backend("triton"):
        global_feature, local_features = cge_kernels.stripe_pool(feature_map, 2, 3.0)
        local_features.sum().backward()
    assert global_feature.shape == (0, 3)
    assert feature_map.grad.shape == (0, 3, 4, 5)


@pytest.mark.parametrize("p", [None, 3.0])
def test_the_same_bits_from_run_to_run(p):
    feature_map = draw_map((2, 5, 7, 3), torch.float32, "channels_last")
    runs = []
    for _ in range(2):
        x = feature_map.clone().requires_grad_()
        exponent = None if p is None else torch.tensor(p, device=KERNEL_DEVICE, requires_grad=True)
        with cge_kernels.backend("triton"):
            global_feature, local_features = cge_kernels.stripe_pool(x, 3, exponent)
            (global_feature.sum() + local_features.square().sum()).backward()
        runs.append([global_feature, local_features, x.grad, *([] if p is None else [exponent.grad])])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))

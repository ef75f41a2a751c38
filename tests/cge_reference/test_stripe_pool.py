"""stripe_pool against loops over its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_reference import stripe_pool


def rows_of_stripe(i: int, stripes: int, height: int) -> range:
    return range(math.floor(i * height / stripes), math.ceil((i + 1) * height / stripes))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 11), data=st.data(), p=st.sampled_from([None, 1.0, 3.0, 0.7]))
def test_every_stripe_is_the_mean_of_its_rows(height, data, p):
    stripes = data.draw(st.integers(1, height))
    feature_map = torch.randn(2, 3, height, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(height))
    global_feature, local_features = stripe_pool(feature_map, stripes, p)
    x = feature_map if p is None else feature_map.clamp(min=1e-6) ** p
    root = 1 if p is None else 1 / p
    torch.testing.assert_close(global_feature, x.mean(dim=(2, 3)) ** root)
    for i in range(stripes):
        rows = x[:, :, list(rows_of_stripe(i, stripes, height))]
        torch.testing.assert_close(local_features[:, i], rows.mean(dim=(2, 3)) ** root)


def test_neighbouring_stripes_share_a_row_where_n_does_not_divide_the_height():
    feature_map = torch.zeros(1, 1, 3, 1)
    feature_map[0, 0, 1, 0] = 1.0
    _, local_features = stripe_pool(feature_map, 2)
    assert local_features.tolist() == [[[0.5], [0.5]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_dtypes_are_pooled_and_returned_in_float32(dtype):
    feature_map = torch.rand(2, 3, 4, 5).to(dtype)
    global_feature, local_features = stripe_pool(feature_map, 2, p=3.0)
    assert global_feature.dtype == local_features.dtype == torch.float32
    exact, _ = stripe_pool(feature_map.double(), 2, p=3.0)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(global_feature.double(), exact, rtol=1e-6, atol=0)


def test_any_strides_give_the_same_as_contiguous_ones():
    feature_map = torch.rand(2, 6, 4, 5)
    strided = feature_map.to(memory_format=torch.channels_last)
    torch.testing.assert_close(stripe_pool(strided, 2)[0], stripe_pool(feature_map, 2)[0])
    transposed = torch.rand(2, 6, 5, 4).transpose(2, 3)
    torch.testing.assert_close(stripe_pool(transposed, 3)[1], stripe_pool(transposed.contiguous(), 3)[1])


def test_gradients_reach_the_map_and_the_learnable_exponent():
    feature_map = torch.rand(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, p: stripe_pool(x, 2, p), (feature_map, p))
    assert torch.autograd.gradcheck(lambda x: stripe_pool(x, 3), (feature_map,))


def test_activations_below_eps_are_clamped_and_get_no_gradient():
    feature_map = torch.tensor([[[[-5.0, 2.0]]]], requires_grad=True)
    global_feature, _ = stripe_pool(feature_map, 1, p=2.0)
    assert global_feature.item() == pytest.approx(math.sqrt((1e-12 + 4) / 2))
    global_feature.sum().backward()
    assert feature_map.grad[0, 0, 0, 0] == 0

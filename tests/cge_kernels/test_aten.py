"""The operators on ATen against the plain ones in float64: values, and gradients by autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import cge_kernels
import cge_reference
from cge_kernels.stripe_pool.cpu import stripe_pool as stripe_pool_on_aten

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SMALLEST, LARGEST = 2.0**-6, 4.0  # of the positive activations in these tests


@pytest.fixture(autouse=True)
def aten():
    with cge_kernels.backend("cpu"):
        yield


@pytest.fixture(params=[1, 1 << 20], ids=["one channel a block", "large blocks"])
def block(request, monkeypatch):
    """Blocks of one channel of one sample, or of everything."""
    monkeypatch.setitem(stripe_pool_on_aten.__globals__, "BLOCK", request.param)


def random_map(*shape, dtype=torch.float64, seed=0):
    """Activations after a ReLU, rounded to a dtype: half are 0, the others lie between SMALLEST and LARGEST."""
    random = torch.Generator().manual_seed(seed)
    positive = torch.empty(shape, dtype=torch.float64).uniform_(SMALLEST, LARGEST, generator=random)
    return positive.mul_(torch.rand(shape, generator=random) < 0.5).to(dtype)


def rounding(dtype, p=None, count=1):
    """Relative error of a feature: of each power, whose exponent p log2 x is rounded, and of a sum of `count` terms."""
    exponent = 0 if p is None else (abs(p) + 1) * max(-math.log2(1e-6), math.log2(LARGEST))
    return torch.finfo(dtype).eps * (4 + count**0.5 + exponent)


def sums_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool_with_gradients(operators, feature_map, stripes, p, gradients):
    """Global feature, local features, gradient of the map and of p; gradients: of both results, None where unused."""
    feature_map = feature_map.detach().requires_grad_()
    exponent = None if p is None else torch.tensor(p, dtype=sums_dtype(feature_map.dtype), requires_grad=True)
    features = operators.stripe_pool(feature_map, stripes, exponent)
    used = [(f, g) for f, g in zip(features, gradients, strict=True) if g is not None]
    torch.autograd.backward([f for f, _ in used], [g.to(f.dtype) for f, g in used])
    return *(f.detach() for f in features), feature_map.grad, None if p is None else exponent.grad


def assert_pools_as_the_reference(feature_map, stripes, p, use_global=True, use_local=True):
    batch, channels, height, width = feature_map.shape
    random = torch.Generator().manual_seed(1)
    # Positive, so that no share of a gradient cancels another.
    grad_global = torch.rand(batch, channels, dtype=torch.float64, generator=random) if use_global else None
    grad_local = torch.rand(batch, stripes, channels, dtype=torch.float64, generator=random) if use_local else None
    gradients = (grad_global, grad_local)
    ours = pool_with_gradients(cge_kernels, feature_map, stripes, p, gradients)
    exact = pool_with_gradients(cge_reference, feature_map.double(), stripes, p, gradients)
    dtype = sums_dtype(feature_map.dtype)
    error = rounding(dtype, p, height * width)
    for feature, wanted in zip(ours[:2], exact[:2], strict=True):
        assert feature.dtype == dtype
        torch.testing.assert_close(feature.double(), wanted, rtol=error, atol=0)
    assert ours[2].dtype == feature_map.dtype
    smallest = torch.finfo(feature_map.dtype).smallest_normal
    error_of_map = 2 * error + torch.finfo(feature_map.dtype).eps
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=error_of_map, atol=smallest)
    if p is not None:
        # dp = (1/p) sum of g f (a mean of ln x - ln f): what is left of terms that cancel.
        terms = sum((g * f).sum() for g, f in zip(gradients, exact[:2], strict=True) if g is not None)
        bound = 2 * error * terms.item() * -math.log(1e-6) / abs(p)
        torch.testing.assert_close(ours[3].double(), exact[3], rtol=0, atol=bound)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [None, 3.0])
def test_pooling_and_its_gradients_equal_the_reference_in_every_dtype(dtype, p):
    assert_pools_as_the_reference(random_map(3, 5, 6, 4, dtype=dtype), 3, p)
    assert_pools_as_the_reference(random_map(2, 4, 7, 3, dtype=dtype), 3, p)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), height=st.integers(1, 9), width=st.integers(1, 4), p=st.sampled_from([None, 0.7, 1.0, 3.0]))
def test_pooling_of_every_height_and_number_of_stripes(data, height, width, p):
    stripes = data.draw(st.integers(1, height))
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    with cge_kernels.backend("cpu"):
        assert_pools_as_the_reference(random_map(batch, channels, height, width, seed=height), stripes, p)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("p", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_pooling_of_any_strides_gives_gradients_of_the_same_strides(dtype, p):
    channels_last = random_map(2, 6, 7, 3, dtype=dtype).to(memory_format=torch.channels_last)
    transposed = random_map(2, 6, 3, 7, dtype=dtype).transpose(2, 3)
    every_other = random_map(2, 12, 7, 6, dtype=dtype)[:, ::2, :, ::2]
    expanded = random_map(1, 6, 7, 3, dtype=dtype).expand(2, 6, 7, 3)
    for feature_map in (channels_last, transposed, every_other, expanded):
        for stripes in (1, 3, 7):
            assert_pools_as_the_reference(feature_map, stripes, p)
    leaf = channels_last.requires_grad_()
    (grad,) = torch.autograd.grad(cge_kernels.stripe_pool(leaf, 3, p)[1].sum(), leaf)
    assert grad.stride() == channels_last.stride()


@pytest.mark.parametrize("p", [-2.0, 0.3, 0.999, 1.001, 8.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_exponents(dtype, p):
    feature_map = random_map(2, 4, 5, 3, dtype=torch.float64)
    # With p = 30, 1e-6^p is 0 in float32: what the reference keeps of it in float64 is not wanted.
    feature_map = feature_map.clamp(min=SMALLEST) if p == 30 and dtype == torch.float32 else feature_map
    assert_pools_as_the_reference((feature_map * 0.25 + 0.75 * (p == 30)).to(dtype), 2, p)


@pytest.mark.parametrize("p", [3.0, 8.0, 30.0])
def test_dead_channels_and_stripes_get_finite_gradients(p):
    feature_map = random_map(2, 3, 6, 4, dtype=torch.float32)
    feature_map[:, 0] = 0
    feature_map[:, 1, :2] = 0
    gradients = (torch.ones(2, 3), torch.ones(2, 3, 3))
    for values in pool_with_gradients(cge_kernels, feature_map, 3, p, gradients):
        assert values.isfinite().all()


def test_a_stripe_far_weaker_than_its_neighbour_overflows_no_power():
    feature_map = torch.full((1, 1, 5, 2), 1e-3)
    feature_map[:, :, 3:] = 3.0
    _, _, grad, grad_p = pool_with_gradients(cge_kernels, feature_map, 3, 12.0, (torch.ones(1, 1), torch.ones(1, 3, 1)))
    exact = pool_with_gradients(cge_reference, feature_map.double(), 3, 12.0, (torch.ones(1, 1), torch.ones(1, 3, 1)))
    assert grad_p.isfinite()
    torch.testing.assert_close(grad.double(), exact[2], rtol=rounding(torch.float32, 12.0), atol=1e-30)


@pytest.mark.parametrize("p", [None, 3.0])
@pytest.mark.parametrize(("use_global", "use_local"), [(True, False), (False, True)])
def test_pooling_with_one_of_two_gradients(p, use_global, use_local):
    assert_pools_as_the_reference(random_map(2, 3, 7, 3), 3, p, use_global, use_local)


@pytest.mark.parametrize("p", [None, 3.0])
def test_nan_reaches_the_features_that_contain_it_and_no_others(p):
    feature_map = torch.ones(1, 2, 6, 2)
    feature_map[0, 0, 0, 0] = torch.nan
    global_feature, local_features = cge_kernels.stripe_pool(feature_map, 3, p)
    assert global_feature.isnan().tolist() == [[True, False]]
    assert local_features.isnan().tolist() == [[[True, False], [False, False], [False, False]]]
    gradients = (None, torch.ones(1, 3, 2))
    if p is not None:
        grad = pool_with_gradients(cge_kernels, feature_map, 3, p, gradients)[2]
        assert grad[0, 0, :2].isnan().all()
        assert grad[0, 0, 2:].isfinite().all()
        assert grad[0, 1].isfinite().all()


def test_an_activation_of_exactly_eps_gets_a_gradient_and_one_below_none():
    eps = torch.tensor(1e-6)
    below = eps.nextafter(torch.tensor(0.0))
    feature_map = torch.stack([eps, below]).view(1, 1, 1, 2).requires_grad_()
    cge_kernels.stripe_pool(feature_map, 1, 3.0)[0].sum().backward()
    assert (feature_map.grad.flatten() > 0).tolist() == [True, False]


@pytest.mark.parametrize("p", [None, 3.0])
def test_gradcheck_of_pooling(p):
    feature_map = (random_map(2, 2, 5, 2) + 0.1).requires_grad_()
    if p is None:
        assert torch.autograd.gradcheck(lambda x: cge_kernels.stripe_pool(x, 3), (feature_map,))
    else:
        exponent = torch.tensor(p, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, p: cge_kernels.stripe_pool(x, 3, p), (feature_map, exponent))


@pytest.mark.parametrize("p", [None, 3.0])
def test_pooling_of_an_empty_batch(p):
    values = pool_with_gradients(cge_kernels, torch.empty(0, 3, 5, 2), 2, p, (torch.empty(0, 3), torch.empty(0, 2, 3)))
    assert [tuple(v.shape) for v in values[:3]] == [(0, 3), (0, 2, 3), (0, 3, 5, 2)]
    assert p is None or values[3] == 0


def random_revision(batch=5, stripes=3, classes=37, channels=8, dtype=torch.float64):
    """Logits (B, N), local features (B, n, C) of which one is zero, and a memory (n, N, C) with a class never seen."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, dtype=torch.float64, generator=random)
    local_features = torch.randn(batch, stripes, channels, dtype=torch.float64, generator=random)
    memory = normalize(torch.randn(stripes, classes, channels, dtype=torch.float64, generator=random), dim=2)
    memory[:, 1] = 0
    return logits.to(dtype), local_features.to(dtype), memory.to(dtype)


def revise_with_gradients(operators, logits, local_features, memory, local_gradient=True):
    logits, local_features = logits.detach().requires_grad_(), local_features.detach().requires_grad_()
    revised = operators.revise_logits(logits, local_features, memory, local_gradient)
    grad = torch.randn(revised.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    revised.backward(grad.to(revised.dtype))
    return revised.detach(), logits.grad, local_features.grad


def assert_revises_as_the_reference(logits, local_features, memory, local_gradient=True):
    ours = revise_with_gradients(cge_kernels, logits, local_features, memory, local_gradient)
    # The operands of the product are cast to the memory's dtype; float64 changes nothing then.
    exact = revise_with_gradients(
        cge_reference, logits.double(), local_features.double(), memory.double(), local_gradient
    )
    # The gradient of a feature is what its projection leaves of a sum over classes of terms below |g p w| / ||f||.
    terms = (exact[1] * logits.double()).abs().sum(dim=1).max() / local_features.double().norm(dim=2).min()
    scales = (exact[0].abs().max(), exact[1].abs().max(), terms)
    for value, wanted, like, scale in zip(ours, exact, (logits, logits, local_features), scales, strict=True):
        if wanted is None:
            assert value is None
            continue
        assert value.dtype == like.dtype
        sums = rounding(sums_dtype(like.dtype), count=memory.shape[1] * memory.shape[2])
        error = sums + torch.finfo(like.dtype).eps
        torch.testing.assert_close(value.double(), wanted, rtol=error, atol=error * scale.item())


@pytest.fixture(params=["256", "0"], ids=["scores kept", "classes in chunks"])
def scratch(request, monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", request.param)


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("local_gradient", [True, False])
def test_revision_and_its_gradients_equal_the_reference_in_every_dtype(dtype, local_gradient):
    assert_revises_as_the_reference(*random_revision(dtype=dtype), local_gradient)


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("stripes", [1, 4])
@pytest.mark.parametrize("classes", [1, 16, 50])
@pytest.mark.parametrize("channels", [1, 7])
def test_revision_of_odd_sizes(batch, stripes, classes, channels):
    logits, local_features, memory = random_revision(batch, stripes, max(2, classes), channels)
    assert_revises_as_the_reference(logits[:, :classes], local_features, memory[:, :classes].contiguous())


@pytest.mark.usefixtures("scratch")
def test_revision_of_any_strides():
    logits, local_features, memory = random_revision()
    transposed = local_features.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert_revises_as_the_reference(logits.T.contiguous().T, transposed, memory)


@pytest.mark.usefixtures("scratch")
def test_revision_by_a_zero_feature_has_finite_gradients():
    logits, local_features, memory = random_revision()
    local_features[0, 0] = 0
    revised, grad_logits, grad_local = revise_with_gradients(cge_kernels, logits, local_features, memory)
    wanted = revise_with_gradients(cge_reference, logits, local_features, memory)[0]
    torch.testing.assert_close(revised, wanted)
    assert grad_logits.isfinite().all()
    assert grad_local.isfinite().all()


@pytest.mark.usefixtures("scratch")
def test_nan_reaches_the_revised_logits_of_its_sample_alone():
    logits, local_features, memory = random_revision()
    local_features[0, 1, 2] = torch.nan
    revised = cge_kernels.revise_logits(logits, local_features, memory)
    assert revised[0].isnan().all()
    assert revised[1:].isfinite().all()


@pytest.mark.usefixtures("scratch")
def test_gradcheck_of_revision():
    logits, local_features, memory = random_revision(batch=2, stripes=2, classes=18, channels=3)
    inputs = (logits.requires_grad_(), local_features.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, f: cge_kernels.revise_logits(p, f, memory), inputs)


def test_kept_scores_are_padded_with_zeros():
    _, scores, _ = torch.ops.cge_kernels.revise_logits(*random_revision(classes=37), True)
    assert scores.shape == (3, 5, 48)
    assert (scores[:, :, 37:] == 0).all()


def test_revision_of_an_empty_batch():
    logits, local_features, memory = random_revision(batch=0)
    shapes = [tuple(value.shape) for value in revise_with_gradients(cge_kernels, logits, local_features, memory)]
    assert shapes == [(0, 37), (0, 37), (0, 3, 8)]


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_revised_cross_entropy_equals_the_reference(dtype):
    _, local_features, memory = random_revision(dtype=dtype)
    random = torch.Generator().manual_seed(2)
    features = torch.randn(5, 6, dtype=torch.float64, generator=random).to(dtype)
    weight = torch.randn(37, 6, dtype=torch.float64, generator=random).to(dtype)
    labels = torch.randint(37, (5,), generator=random)
    results = []
    for operators, cast in ((cge_kernels, dtype), (cge_reference, torch.float64)):
        leaves = [tensor.to(cast, copy=True).requires_grad_() for tensor in (features, weight, local_features)]
        loss, hit, local_hit = operators.revised_cross_entropy(*leaves, memory.to(cast), labels)
        loss.sum().backward()
        results.append((hit, local_hit, loss.detach(), *(leaf.grad for leaf in leaves)))
    (hit, local_hit, *values), (wanted_hit, wanted_local_hit, *wanted) = results
    assert hit.equal(wanted_hit)
    assert local_hit.equal(wanted_local_hit)
    for value, exact in zip(values, wanted, strict=True):
        error = rounding(dtype, count=37 * 8)
        torch.testing.assert_close(value.double(), exact, rtol=error, atol=error * exact.abs().max().item())


@pytest.mark.parametrize("features_dtype", DTYPES)
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16])
def test_the_memory_is_written_as_by_the_reference(features_dtype, memory_dtype, shadow_dtype):
    _, local_features, memory = random_revision()
    labels = torch.tensor([1, 4, 4, 36, 0])
    local_features = local_features.to(features_dtype)
    local_features[4, 0] = 0
    ours = memory.to(memory_dtype)
    exact = ours.to(torch.float64, copy=True)
    shadow = None if shadow_dtype is None else ours.to(shadow_dtype)
    cge_kernels.write_memory_(ours, local_features, labels, 0.3, shadow)
    cge_reference.write_memory_(exact, local_features.double(), labels, 0.3)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=rounding(memory_dtype, count=8))
    if shadow is not None:
        written = labels.unique()
        assert shadow[:, written].equal(ours[:, written].to(shadow_dtype))


def test_an_empty_batch_writes_nothing():
    _, local_features, memory = random_revision(batch=0)
    before = memory.clone()
    cge_kernels.write_memory_(memory, local_features, torch.empty(0, dtype=torch.int64), 0.3)
    assert memory.equal(before)


@pytest.mark.parametrize("p", [None, 3.0])
def test_the_same_call_gives_the_same_bits(p):
    feature_map = random_map(4, 64, 24, 8, dtype=torch.float32)
    gradients = (torch.ones(4, 64), torch.ones(4, 3, 64))
    first, second = (pool_with_gradients(cge_kernels, feature_map, 3, p, gradients) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is b is None or a.equal(b)

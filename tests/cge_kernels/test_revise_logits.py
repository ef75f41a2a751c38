"""The revise_logits kernels against cge_reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import KERNEL_DEVICE, ROUNDING, assert_within
from torch.nn.functional import normalize

import cge_kernels
import cge_reference

FLOAT32 = ROUNDING[torch.float32]


def example(batch=3, stripes=2, classes=5, channels=4, seed=0):
    """Logits, local features and memory (whose class 0 was never seen), float32."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, generator=random)
    local_features = torch.randn(batch, stripes, channels, generator=random)
    memory = normalize(torch.randn(stripes, classes, channels, generator=random), dim=2)
    memory[:, 0] = 0
    return tuple(tensor.to(KERNEL_DEVICE) for tensor in (logits, local_features, memory))


def check_parity(logits, local_features, memory, local_gradient=True):
    """Values and gradients, with an uneven upstream gradient, within bounds derived below."""
    channels, classes = memory.shape[2], memory.shape[1]
    ours = [tensor.detach().requires_grad_() for tensor in (logits, local_features)]
    with cge_kernels.backend("triton"):
        revised = cge_kernels.revise_logits(*ours, memory, local_gradient)
        upstream = torch.randn(revised.shape, generator=torch.Generator().manual_seed(1)).to(revised)
        revised.backward(upstream)
    truth_of = [tensor.detach().double().requires_grad_() for tensor in (logits, local_features)]
    truth = cge_reference.revise_logits(*truth_of, memory.double(), local_gradient)
    truth.backward(upstream.double())
    # The features are rounded to the memory's dtype for the product. A score is a sum of C products whose sizes add up
    # to at most 1 (Cauchy and Schwarz); log w is no farther off than the scores; sigmoid, log, exp and the product of
    # the two add 8 roundings.
    score = ROUNDING[memory.dtype] + (channels + 8) * FLOAT32
    stored = ROUNDING[logits.dtype]
    assert revised.dtype == logits.dtype
    assert_within(revised, truth, (score + stored) * truth.detach().abs().cpu() + 1e-30)
    assert_within(ours[0].grad, truth_of[0].grad, (score + stored) * truth_of[0].grad.abs().cpu() + 1e-30)
    if not local_gradient:
        assert ours[1].grad is None
        return
    # df = (ds M - u <ds, s>) / ||f||: ds is off by its scores, twice, and is rounded to the memory's dtype for the
    # product; the sums run over N.
    length = truth_of[1].detach().norm(dim=2, keepdim=True)
    unit = truth_of[1].detach() / length
    scores = torch.einsum("bic,ikc->bik", unit, memory.double())
    grad_scores = ((upstream.double() * truth.detach())[:, None] * (1 - scores.sigmoid())).abs() / memory.shape[0]
    sizes = torch.einsum("bik,ikc->bic", grad_scores, memory.double().abs())
    sizes = (sizes + unit.abs() * grad_scores.sum(dim=2, keepdim=True)) / length
    bound = (ROUNDING[memory.dtype] + 2 * score + (classes + 8) * FLOAT32) * sizes
    assert ours[1].grad.dtype == local_features.dtype
    true_local = truth_of[1].grad
    assert_within(ours[1].grad, true_local, (bound + ROUNDING[local_features.dtype] * true_local.abs()).cpu() + 1e-30)


@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients_in_every_dtype(dtype, memory_dtype):
    logits, local_features, memory = example(17, 3, 37, 21)
    check_parity(logits.to(dtype), local_features.to(dtype), memory.to(memory_dtype))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), memory_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_odd_sizes(data, memory_dtype):
    sizes = [data.draw(st.integers(1, most)) for most in (5, 4, 40, 70)]
    logits, local_features, memory = example(*sizes)
    check_parity(logits, local_features, memory.to(memory_dtype))


def test_more_samples_classes_and_channels_than_one_tile():
    check_parity(*example(70, 2, 150, 130))


def test_any_strides_of_logits_and_local_features():
    logits, local_features, memory = example(4, 3, 7, 5)
    strided_logits = logits.T.contiguous().T
    strided_features = local_features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check_parity(strided_logits, strided_features, memory)
    check_parity(
        torch.cat([logits, logits], dim=1)[:, 7:], torch.cat([local_features] * 2, dim=2)[:, :, ::2], memory[:, :, :5]
    )


def test_without_local_gradient():
    check_parity(*example(), local_gradient=False)


@pytest.mark.parametrize("local_gradient", [True, False])
def test_scores_that_exceed_the_scratch_budget_are_computed_again_chunk_by_chunk(monkeypatch, local_gradient):
    arguments = example(5, 2, 100, 7)
    launches = []
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    with cge_kernels.launching(lambda launch: (launches.append(launch.kernel.fn.__name__), launch.run())):
        check_parity(*arguments, local_gradient)
    assert launches.count("revise_kernel") == 1 + 7  # 100 classes in chunks of 16


def test_features_of_length_zero_weigh_one_half_and_have_finite_gradients():
    logits, local_features, memory = example()
    local_features[1] = 0
    local_features.requires_grad_()
    with cge_kernels.backend("triton"):
        revised = cge_kernels.revise_logits(logits, local_features, memory)
        revised.sum().backward()
    assert torch.equal(revised[1], logits[1] / 2)
    assert local_features.grad.isfinite().all()


def test_no_gradient_reaches_the_memory_and_a_write_before_the_backward_is_an_error():
    logits, local_features, memory = example()
    with cge_kernels.backend("triton"):
        revised = cge_kernels.revise_logits(logits.requires_grad_(), local_features, memory)
        memory.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            revised.sum().backward()


def test_the_same_bits_from_run_to_run():
    arguments = example(17, 3, 70, 33)
    runs = []
    for _ in range(2):
        logits, local_features = (tensor.clone().requires_grad_() for tensor in arguments[:2])
        with cge_kernels.backend("triton"):
            revised = cge_kernels.revise_logits(logits, local_features, arguments[2])
            revised.square().sum().backward()
        runs.append([revised, logits.grad, local_features.grad])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_the_reference_is_the_truth_that_these_tests_derive():
    logits, local_features, memory = (tensor.double() for tensor in example())
    with cge_kernels.backend("cpu"):
        ours = cge_kernels.revise_logits(logits, local_features, memory)
    torch.testing.assert_close(ours, cge_reference.revise_logits(logits, local_features, memory))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 6)}, ValueError, r"logits must have shape \(3, 5\) to fit .* got \(3, 6\)"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "logits must have a floating dtype"),
        ({"local_features": torch.zeros(3, 2, 7)}, ValueError, r"memory must have shape \(2, 5, 7\)"),
        ({"memory": torch.zeros(5, 4)}, ValueError, r"memory must have shape \(n, N, C\), got \(5, 4\)"),
        ({"memory": torch.zeros(2, 4, 5).transpose(1, 2)}, ValueError, "memory must be contiguous, got strides"),
        ({"memory": torch.zeros(2, 0, 4)}, ValueError, "memory must have no empty dimension"),
        ({"memory": torch.zeros(2, 5, 4, device="meta")}, ValueError, "one device, got .* memory on meta"),
    ],
)
def test_wrong_arguments_are_named_before_any_launch(change, error, message):
    arguments = dict(zip(("logits", "local_features", "memory"), (t.cpu() for t in example()), strict=True))
    launches = []
    with (
        cge_kernels.backend("triton"),
        cge_kernels.launching(launches.append),
        pytest.raises(error, match=message),
    ):
        cge_kernels.revise_logits(**(arguments | change))
    assert not launches

"""revise_logits on every backend: values and gradients, tiles and chunks of classes, features without a direction."""

import pytest
import torch
from error_budget import check_parity
from hypothesis import given, settings
from hypothesis import strategies as st
from support import draw_sample

import cge_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*sizes, dtype=torch.float32, memory_dtype=None, seed=0):
    """Arguments for (batch, stripes, classes, channels); memory_dtype is dtype if None."""
    sample = draw_sample(*sizes, seed=seed)
    return {
        "logits": sample.logits.to(dtype),
        "local_features": sample.local_features.to(dtype),
        "memory": sample.memory.to(memory_dtype or dtype),
    }


def check(arguments, backend, **options):
    return check_parity("revise_logits", arguments, backend, **options)


@pytest.mark.parametrize("memory_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_in_every_dtype(dtype, memory_dtype, backend):
    check(draw(5, 3, 19, 17, dtype=dtype, memory_dtype=memory_dtype), backend)


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("local_gradient", [True, False])
def test_kept_and_chunked_scores_in_every_dtype_on_the_cpu(dtype, local_gradient):
    check(draw(5, 3, 37, 8, dtype=dtype) | {"local_gradient": local_gradient}, "cpu")


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    memory_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    backend=st.sampled_from(["triton", "cpu"]),
)
def test_odd_sizes(sizes, memory_dtype, backend):
    check(draw(*sizes, memory_dtype=memory_dtype), backend)


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 4, 16, 7), (2, 1, 50, 1), (2, 4, 17, 1)])
def test_chunks_of_odd_sizes(sizes, backend):
    check(draw(*sizes), backend)


@pytest.mark.slow
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16])
def test_more_samples_classes_and_channels_than_one_tile(memory_dtype, backend):
    check(draw(65, 2, 67, 67, memory_dtype=memory_dtype), backend)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "classes"), [("triton", 130), ("cpu", 1041)])
def test_the_papers_channels_in_a_small_batch(backend, classes):
    check(draw(2, 3, classes, 2048, memory_dtype=torch.bfloat16), backend)


@pytest.mark.usefixtures("scratch")
def test_any_strides_of_logits_and_local_features(backend):
    arguments = draw(4, 3, 7, 5)
    logits, local_features = arguments["logits"], arguments["local_features"]
    transposed = local_features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check(arguments | {"logits": logits.T.contiguous().T, "local_features": transposed}, backend)
    every_other = torch.cat([local_features] * 2, dim=2)[:, :, 1::2]
    check(arguments | {"logits": torch.cat([logits] * 2, dim=1)[:, 7:], "local_features": every_other}, backend)


def test_without_local_gradient(backend):
    assert check(draw() | {"local_gradient": False}, backend)["grad_local_features"] is None


@pytest.mark.parametrize("local_gradient", [True, False])
def test_scores_beyond_the_scratch_budget_are_computed_again_chunk_by_chunk(monkeypatch, local_gradient):
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    kernels = []
    with cge_kernels.launching(lambda launch: (kernels.append(launch.kernel.fn.__name__), launch.run())):
        check(draw(3, 2, 40, 7) | {"local_gradient": local_gradient}, "triton")
    assert kernels.count("revise_kernel") == 1 + 3  # 40 classes in chunks of 16


@pytest.mark.usefixtures("scratch")
def test_features_of_length_zero_weigh_one_half_and_have_finite_gradients(any_backend):
    arguments = draw()
    arguments["local_features"][1] = 0
    leaves = {name: arguments[name].requires_grad_() for name in ("logits", "local_features")}
    revised = cge_kernels.revise_logits(**arguments)
    revised.sum().backward()
    torch.testing.assert_close(revised[1], arguments["logits"][1] / 2, rtol=1e-6, atol=0)
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.usefixtures("scratch")
def test_nan_reaches_the_logits_of_its_sample_alone(any_backend):
    arguments = draw()
    arguments["local_features"][1, 0, 2] = torch.nan
    revised = cge_kernels.revise_logits(**arguments)
    assert revised[1].isnan().all()
    assert revised[[0, 2]].isfinite().all()


def test_an_empty_batch(any_backend):
    arguments = draw(0, 3, 7, 5)
    leaves = [arguments[name].requires_grad_() for name in ("logits", "local_features")]
    revised = cge_kernels.revise_logits(**arguments)
    revised.sum().backward()
    assert [tuple(value.shape) for value in (revised, *(leaf.grad for leaf in leaves))] == [(0, 7), (0, 7), (0, 3, 5)]


def test_kept_scores_are_padded_with_zeros_on_the_cpu():
    with cge_kernels.backend("cpu"):
        _, scores, _ = torch.ops.cge_kernels.revise_logits(*draw(5, 3, 37, 8).values(), True)
    assert scores.shape == (3, 5, 48)
    assert (scores[:, :, 37:] == 0).all()


@pytest.mark.usefixtures("scratch")
def test_finite_differences_on_the_cpu():
    arguments = draw(2, 2, 18, 3, dtype=torch.float64)
    memory = arguments.pop("memory")
    inputs = [value.requires_grad_() for value in arguments.values()]
    with cge_kernels.backend("cpu"):
        assert torch.autograd.gradcheck(lambda p, f: cge_kernels.revise_logits(p, f, memory), inputs)


def test_a_write_before_the_backward_is_an_error(backend):
    arguments = draw()
    revised = cge_kernels.revise_logits(**arguments | {"logits": arguments["logits"].requires_grad_()})
    arguments["memory"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        revised.sum().backward()


@pytest.mark.slow
def test_the_same_bits_from_run_to_run(backend):
    first, second = (check(draw(5, 3, 35, 33), backend) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    order=st.permutations(range(4)),
    power=st.integers(-8, 8),
    backend=st.sampled_from(["triton", "cpu"]),
)
def test_order_of_samples_and_length_of_features_change_no_bit(order, power, backend):
    arguments = draw(4, 2, 5, 9)
    with cge_kernels.backend(backend):
        revised = cge_kernels.revise_logits(**arguments)
        longer = cge_kernels.revise_logits(**arguments | {"local_features": arguments["local_features"] * 2.0**power})
        permuted = {name: arguments[name][list(order)] for name in ("logits", "local_features")}
        reordered = cge_kernels.revise_logits(**arguments | permuted)
    assert longer.equal(revised)
    assert reordered.equal(revised[list(order)])

"""write_memory_ on every backend: written rows, rows never seen, instances that cancel, labels out of range."""

import pytest
import torch
from error_budget import ROUNDING
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GPU, KERNEL_DEVICE, draw_sample
from write_budget import check_write

import cge_kernels
import cge_reference


def draw(batch=5, stripes=2, classes=4, channels=3, seed=0):
    """memory, local_features and labels."""
    sample = draw_sample(batch, stripes, classes, channels, seed=seed)
    return sample.memory, sample.local_features, sample.labels


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 7),
    channels=st.sampled_from([1, 3, 37, 130]),
    seed=st.integers(0, 99),
    momentum=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    is_transposed=st.booleans(),
    backend=st.sampled_from(["triton", "cpu"]),
)
def test_written_rows(batch, channels, seed, momentum, dtype, is_transposed, backend):
    memory, local_features, labels = draw(batch, 3, 4, channels, seed)
    local_features = local_features.to(dtype)
    if is_transposed:
        local_features = local_features.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    check_write(memory, local_features, labels, momentum, backend)


@pytest.mark.parametrize("features_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low_precision_dtype", [None, torch.bfloat16])
def test_every_dtype_on_the_cpu(features_dtype, memory_dtype, low_precision_dtype):
    memory, local_features, labels = draw(6, 3, 4, 8)
    memory = memory.to(memory_dtype)
    rounded = None if low_precision_dtype is None else memory.to(low_precision_dtype)
    check_write(memory, local_features.to(features_dtype), labels, 0.3, "cpu", rounded)
    if rounded is not None:
        written = labels.unique()
        assert rounded[:, written].equal(memory[:, written].to(low_precision_dtype))


def test_the_papers_channels(backend):
    memory, local_features, labels = draw(6, 3, 4, 2048)
    check_write(memory, local_features, labels, 0.5, backend)


def test_the_low_precision_memory_is_refreshed_in_the_written_rows_only(any_backend):
    memory, local_features, labels = draw()
    rounded = torch.full_like(memory, 7, dtype=torch.bfloat16)
    cge_kernels.write_memory_(memory, local_features, labels, 0.3, rounded)
    written = torch.zeros(4, dtype=torch.bool, device=KERNEL_DEVICE).index_fill(0, labels, True)
    error = (rounded[:, written].double() - memory[:, written].double()).abs()
    assert (error <= ROUNDING[torch.bfloat16] * memory[:, written].double().abs()).all()
    assert (rounded[:, ~written] == 7).all()


@pytest.mark.parametrize("momentum", [1.0, torch.tensor(1.0)])
def test_a_row_never_seen_is_taken_whole_even_with_momentum_one(momentum, any_backend):
    memory = torch.zeros(1, 2, 2, device=KERNEL_DEVICE)
    feature = torch.tensor([[[3.0, 4.0]]], device=KERNEL_DEVICE)
    cge_kernels.write_memory_(memory, feature, torch.tensor([1], device=KERNEL_DEVICE), momentum)
    torch.testing.assert_close(memory.cpu(), torch.tensor([[[0.0, 0.0], [0.6, 0.8]]]))


def test_with_momentum_one_a_row_seen_before_stays(any_backend):
    memory, local_features, labels = draw()
    before = memory.clone()
    cge_kernels.write_memory_(memory, local_features, labels.clamp(min=1), 1.0)
    torch.testing.assert_close(memory, before)


def test_instances_that_cancel_leave_the_row_as_it_is(any_backend):
    memory = torch.tensor([[[0.6, 0.8]]], device=KERNEL_DEVICE)
    features = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]], device=KERNEL_DEVICE)
    cge_kernels.write_memory_(memory, features, torch.tensor([0, 0], device=KERNEL_DEVICE), 0.5)
    assert torch.equal(memory.cpu(), torch.tensor([[[0.6, 0.8]]]))


@pytest.mark.parametrize("size", [1e-14, 1e-25, 0.0])
def test_a_feature_too_small_to_have_a_direction_leaves_the_row_as_it_is(size, any_backend):
    memory = torch.zeros(1, 1, 3, device=KERNEL_DEVICE)
    feature = torch.full((1, 1, 3), size, device=KERNEL_DEVICE)
    cge_kernels.write_memory_(memory, feature, torch.tensor([0], device=KERNEL_DEVICE), 0.5)
    assert (memory == 0).all()


def test_an_empty_batch_writes_nothing_and_identities_outside_the_batch_stay_untouched(any_backend):
    memory, local_features, labels = draw()
    before = memory.clone()
    cge_kernels.write_memory_(memory, local_features[:0], labels[:0], 0.3)
    assert memory.equal(before)
    cge_kernels.write_memory_(memory, local_features, labels.fill_(2), 0.1)
    assert memory[:, [0, 1, 3]].equal(before[:, [0, 1, 3]])
    assert not memory[:, 2].equal(before[:, 2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_labels_of_any_integer_dtype_and_stride(dtype, backend):
    memory, local_features, labels = draw()
    check_write(memory, local_features, labels.to(dtype).repeat_interleave(2)[::2], 0.5, backend)


def test_no_graph_is_kept(any_backend):
    memory, local_features, labels = draw()
    cge_kernels.write_memory_(memory, local_features.requires_grad_(), labels, 0.5)
    assert not memory.requires_grad


def test_it_is_one_launch_for_all_stripes():
    launches = []
    memory, local_features, labels = (tensor.cpu() for tensor in draw())
    with cge_kernels.backend("triton"), cge_kernels.launching(launches.append):
        cge_kernels.write_memory_(memory, local_features, labels, 0.3, memory.bfloat16())
    assert len(launches) == 1


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_label_out_of_range_writes_nothing_in_the_kernel(wrong):
    memory, local_features, _ = draw()
    labels = torch.tensor([1, 2, 3, 2, 1])
    valid = torch.arange(5) != 1
    expected = cge_reference.write_memory_(memory.cpu().clone(), local_features.cpu()[valid], labels[valid], 0.5)
    # As on a GPU, where nobody looks at the labels before the launch.
    captured = []
    with cge_kernels.backend("triton"), cge_kernels.launching(captured.append):
        cge_kernels.write_memory_(memory, local_features, labels.to(KERNEL_DEVICE), 0.5)
    next(value for name, value in captured[0].args.items() if name.startswith("label") and value is not None)[1] = wrong
    captured[0].run()
    torch.testing.assert_close(memory.cpu(), expected, rtol=0, atol=1e-6)


def test_the_same_bits_from_run_to_run(backend):
    memory, local_features, labels = draw(7, 2, 3, 37)
    first, second = (cge_kernels.write_memory_(memory.clone(), local_features, labels, 0.5) for _ in range(2))
    assert first.equal(second)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(power=st.integers(-8, 8), backend=st.sampled_from(["triton", "cpu"]))
def test_the_length_of_all_features_changes_no_bit(power, backend):
    memory, local_features, labels = draw()
    other = memory.clone()
    with cge_kernels.backend(backend):
        cge_kernels.write_memory_(memory, local_features, labels, 0.5)
        cge_kernels.write_memory_(other, local_features * 2.0**power, labels, 0.5)
    assert other.equal(memory)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_write_can_be_captured_in_a_cuda_graph():
    memory, local_features, labels = draw()
    expected = cge_reference.write_memory_(memory.clone(), local_features, labels, 0.5)
    momentum = torch.tensor(0.5, device="cuda")
    cge_kernels.write_memory_(memory.clone(), local_features, labels, momentum)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cge_kernels.write_memory_(memory, local_features, labels, momentum)
    graph.replay()
    torch.testing.assert_close(memory, expected, rtol=0, atol=1e-6)

"""The write_memory_ kernel against cge_reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GPU, KERNEL_DEVICE, ROUNDING, assert_within
from torch.nn.functional import normalize

import cge_kernels
import cge_reference


def example(batch=5, stripes=2, classes=4, channels=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    memory = normalize(torch.randn(stripes, classes, channels, generator=random), dim=2)
    memory[:, 0] = 0  # never seen
    local_features = torch.randn(batch, stripes, channels, generator=random)
    labels = torch.randint(classes, (batch,), generator=random)
    return tuple(tensor.to(KERNEL_DEVICE) for tensor in (memory, local_features, labels))


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(), alpha=st.sampled_from([0.0, 0.01, 0.5, 1.0]), dtype=st.sampled_from([torch.float32, torch.float16])
)
def test_written_rows(data, alpha, dtype):
    batch, channels = data.draw(st.integers(0, 7)), data.draw(st.sampled_from([1, 3, 37, 130]))
    memory, local_features, labels = example(batch, 3, 4, channels, data.draw(st.integers(0, 99)))
    local_features = local_features.to(dtype)
    if data.draw(st.booleans()):
        local_features = local_features.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    truth = cge_reference.write_memory_(memory.double(), local_features.double(), labels, alpha)
    with cge_kernels.backend("triton"):
        assert cge_kernels.write_memory_(memory, local_features, labels, alpha) is memory
    # Rows are unit vectors. Means and lengths take at most 7 + C roundings; cancelling instances or a row opposite to
    # its update magnify them by the length that is left, which these seeds keep above 1/50.
    assert_within(memory, truth, 50 * (channels + 16) * ROUNDING[torch.float32])


def test_the_shadow_is_refreshed_in_the_written_rows_only():
    memory, local_features, labels = example()
    shadow = torch.full_like(memory, 7, dtype=torch.bfloat16)
    with cge_kernels.backend("triton"):
        cge_kernels.write_memory_(memory, local_features, labels, 0.3, shadow)
    written = torch.zeros(4, dtype=torch.bool, device=KERNEL_DEVICE).index_fill(0, labels, True)
    assert_within(shadow[:, written], memory[:, written], ROUNDING[torch.bfloat16] * memory[:, written].abs().cpu())
    assert (shadow[:, ~written] == 7).all()


def test_it_is_one_launch_for_all_stripes():
    launches = []
    memory, local_features, labels = (tensor.cpu() for tensor in example())
    with cge_kernels.backend("triton"), cge_kernels.launching(launches.append):
        cge_kernels.write_memory_(memory, local_features, labels, 0.3, memory.bfloat16())
    assert len(launches) == 1


@pytest.mark.parametrize("alpha", [1.0, torch.tensor(1.0)])
def test_a_row_never_seen_is_taken_whole_even_with_alpha_one(alpha):
    memory = torch.zeros(1, 2, 2, device=KERNEL_DEVICE)
    feature = torch.tensor([[[3.0, 4.0]]], device=KERNEL_DEVICE)
    with cge_kernels.backend("triton"):
        cge_kernels.write_memory_(memory, feature, torch.tensor([1], device=KERNEL_DEVICE), alpha)
    torch.testing.assert_close(memory.cpu(), torch.tensor([[[0.0, 0.0], [0.6, 0.8]]]))


def test_instances_that_cancel_leave_the_row_as_it_is():
    memory = torch.tensor([[[0.6, 0.8]]], device=KERNEL_DEVICE)
    features = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]], device=KERNEL_DEVICE)
    with cge_kernels.backend("triton"):
        cge_kernels.write_memory_(memory, features, torch.tensor([0, 0], device=KERNEL_DEVICE), 0.5)
    assert torch.equal(memory.cpu(), torch.tensor([[[0.6, 0.8]]]))


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_label_out_of_range_is_an_error_on_the_cpu_and_writes_nothing_in_the_kernel(wrong):
    memory, local_features, labels = example()
    labels = torch.tensor([1, 2, 3, 2, 1])
    before = memory.clone()
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 4\), got {wrong}"):
        cge_kernels.write_memory_(memory.cpu(), local_features.cpu(), labels.index_fill(0, torch.tensor(1), wrong), 0.5)
    # As on a GPU, where nobody looks at the labels before the launch.
    captured = []
    with cge_kernels.backend("triton"), cge_kernels.launching(captured.append):
        cge_kernels.write_memory_(memory, local_features, labels.clone().to(KERNEL_DEVICE), 0.5)
    captured[0].args["labels_pointer"][1] = wrong
    captured[0].run()
    valid = torch.arange(5) != 1
    expected = cge_reference.write_memory_(before.cpu(), local_features.cpu()[valid], labels[valid], 0.5)
    torch.testing.assert_close(memory.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_labels_of_any_integer_dtype_and_stride(dtype):
    memory, local_features, labels = example()
    expected = cge_reference.write_memory_(memory.clone(), local_features, labels, 0.5)
    strided = labels.to(dtype).repeat_interleave(2)[::2]
    with cge_kernels.backend("triton"):
        cge_kernels.write_memory_(memory, local_features, strided, 0.5)
    torch.testing.assert_close(memory, expected, rtol=0, atol=1e-6)


def test_wrong_arguments_are_named_and_nothing_is_written():
    memory, local_features, labels = (tensor.cpu() for tensor in example())
    before = memory.clone()
    write = cge_kernels.write_memory_
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        write(memory, local_features, labels, 1.5)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        write(memory, local_features, labels, torch.tensor(1.5))
    with pytest.raises(ValueError, match="memory must be contiguous, got strides"):
        write(memory.transpose(0, 1).contiguous().transpose(0, 1), local_features, labels, 0.5)
    with pytest.raises(ValueError, match=r"local_features must have shape \(5, 2, 3\)"):
        write(memory, local_features[:, :1], labels, 0.5)
    with pytest.raises(TypeError, match="memory must be float32 or float64"):
        write(memory.bfloat16(), local_features, labels, 0.5)
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        write(memory, local_features, labels.float(), 0.5)
    with pytest.raises(ValueError, match="low_precision_memory must have shape"):
        write(memory, local_features, labels, 0.5, memory[:, :2].contiguous())
    assert torch.equal(memory, before)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_write_can_be_captured_in_a_cuda_graph():
    memory, local_features, labels = example()
    expected = cge_reference.write_memory_(memory.clone(), local_features, labels, 0.5)
    alpha = torch.tensor(0.5, device="cuda")
    cge_kernels.write_memory_(memory.clone(), local_features, labels, alpha)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cge_kernels.write_memory_(memory, local_features, labels, alpha)
    graph.replay()
    torch.testing.assert_close(memory, expected, rtol=0, atol=1e-6)

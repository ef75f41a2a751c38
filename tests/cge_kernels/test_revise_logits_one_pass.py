"""The one-launch kernel against pooling and revision one after the other."""

import pytest
import torch
from support import GPU, KERNEL_DEVICE, ROUNDING, assert_within
from torch.nn.functional import normalize

import cge_kernels
import cge_reference


def example(batch=3, channels=21, height=7, width=3, stripes=3, classes=37, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    feature_map = torch.rand(batch, channels, height, width, generator=random).to(dtype)
    logits = torch.randn(batch, classes, generator=random)
    memory = normalize(torch.randn(stripes, classes, channels, generator=random), dim=2)
    return tuple(tensor.to(KERNEL_DEVICE) for tensor in (feature_map, logits, memory))


@pytest.mark.parametrize("p", [None, 3.0])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients(p, memory_dtype, channels_last):
    feature_map, logits, memory = example()
    if channels_last:
        feature_map = feature_map.to(memory_format=torch.channels_last)
    memory = memory.to(memory_dtype)
    results = []
    for package, dtype in ((cge_kernels, torch.float32), (cge_reference, torch.float64)):
        x, scores = (tensor.detach().to(dtype).requires_grad_() for tensor in (feature_map, logits))
        exponent = None if p is None else torch.tensor(p, dtype=dtype, device=KERNEL_DEVICE, requires_grad=True)
        with cge_kernels.backend("triton"):
            revised, local_features = package.revise_logits_one_pass(
                x, scores, memory.to(dtype if package is cge_reference else memory_dtype), exponent
            )
            random = torch.Generator().manual_seed(1)
            upstream = [torch.randn(t.shape, generator=random).to(t) for t in (revised, local_features)]
            torch.autograd.backward((revised, local_features), upstream)
        results.append([revised, local_features, x.grad, scores.grad, *([] if p is None else [exponent.grad])])
    # The matmul's operands are rounded to the memory's dtype; the rest is float32 with sums of at most 150 numbers.
    relative = 2 * ROUNDING[memory_dtype] + 150 * ROUNDING[torch.float32]
    for ours, truth in zip(*results, strict=True):
        assert_within(ours, truth, relative * truth.detach().abs().max().item())


def test_it_is_one_launch():
    names = []
    feature_map, logits, memory = example()
    with (
        cge_kernels.backend("triton"),
        cge_kernels.launching(lambda launch: (names.append(launch.kernel.fn.__name__), launch.run())),
    ):
        cge_kernels.revise_logits_one_pass(feature_map, logits, memory)
    assert names == ["one_pass_kernel"]


def test_the_grid_is_resident_as_a_whole():
    launches = []
    feature_map, logits, memory = (tensor.cpu() for tensor in example(classes=3000))
    for multiprocessors in (1, 4, 1000):
        target = cge_kernels.Target("cuda", 90, 32, multiprocessors, 227 * 1024)
        with cge_kernels.backend("triton"), cge_kernels.launching(launches.append, target):
            cge_kernels.revise_logits_one_pass(feature_map, logits, memory)
        assert launches[-1].grid[0] <= multiprocessors
        assert launches[-1].options["launch_cooperative_grid"]
    counters = [launch.args["counter_pointer"] for launch in launches]
    assert len({counter.data_ptr() for counter in counters}) == 3  # a fresh counter for each call
    assert all(counter.dtype == torch.int32 and counter.tolist() == [0] for counter in counters)


@pytest.mark.skipif(not GPU, reason="the interpreter has one program")
def test_many_programs_meet_at_the_barrier():
    feature_map, logits, memory = example(64, 256, 24, 8, 3, 1041)
    first = cge_kernels.revise_logits_one_pass(feature_map, logits, memory)
    for _ in range(50):
        again = cge_kernels.revise_logits_one_pass(feature_map, logits, memory)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_wrong_arguments_are_named():
    feature_map, logits, memory = example()
    with pytest.raises(ValueError, match=r"memory must have shape \(3, 37, 21\) to fit feature_map"):
        cge_kernels.revise_logits_one_pass(feature_map, logits, memory[:, :, :20].contiguous())
    with pytest.raises(ValueError, match=r"logits must have shape \(3, 37\)"):
        cge_kernels.revise_logits_one_pass(feature_map, logits[:2], memory)
    with pytest.raises(ValueError, match="stripes must lie between 1 and the feature map's height 2, got 3"):
        cge_kernels.revise_logits_one_pass(feature_map[:, :, :2], logits, memory)

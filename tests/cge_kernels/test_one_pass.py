"""revise_logits_one_pass on every backend: values and gradients; one launch, whose programs are all resident."""

import pytest
import torch
from error_budget import assert_within_budget, budget, check_parity, rounding_of
from support import GPU, draw_sample

import cge_kernels


def draw(memory_dtype=torch.float32, p=None, channels_last=False, **sizes):
    """Arguments: a positive map, odd sizes unless others are given."""
    sizes = {"batch": 3, "stripes": 3, "classes": 19, "channels": 18, "height": 7, "width": 3} | sizes
    sample = draw_sample(**sizes)
    feature_map = sample.feature_map.sigmoid()
    if channels_last:
        feature_map = feature_map.to(memory_format=torch.channels_last)
    p = None if p is None else torch.tensor(p, device=feature_map.device)
    memory = sample.memory.to(memory_dtype)
    return {"feature_map": feature_map, "logits": sample.logits, "memory": memory, "p": p}


@pytest.mark.parametrize("p", [None, 3.0])
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients(p, memory_dtype, channels_last, backend):
    arguments = draw(memory_dtype, p, channels_last)
    ours = check_parity("revise_logits_one_pass", arguments, backend)
    # The budget allows for the worst case in two operators; what adds up by chance stays far below it.
    truth = budget("revise_logits_one_pass", arguments).truth
    unit, cast = rounding_of(arguments)
    for name, value in ours.items():
        assert_within_budget(value, truth[name], value, (2 * cast + 150 * unit) * truth[name].abs().max(), name)


def test_one_class_one_sample_one_position(backend):
    sizes = {"batch": 1, "stripes": 1, "classes": 1, "channels": 1, "height": 1, "width": 1}
    check_parity("revise_logits_one_pass", draw(p=3.0, **sizes), backend)


def test_without_local_gradient_the_map_learns_from_the_local_features_alone(any_backend):
    arguments = draw() | {"local_gradient": False}
    arguments["feature_map"].requires_grad_()
    revised, local_features = cge_kernels.revise_logits_one_pass(**arguments)
    assert not revised.requires_grad or torch.autograd.grad(
        revised.sum(), arguments["feature_map"], retain_graph=True, allow_unused=True, materialize_grads=True
    )[0].equal(torch.zeros_like(arguments["feature_map"]))
    local_features.sum().backward()
    assert arguments["feature_map"].grad.abs().max() > 0


def test_it_is_pooling_then_revision(any_backend):
    arguments = draw(p=3.0)
    revised, local_features = cge_kernels.revise_logits_one_pass(**arguments)
    _, pooled = cge_kernels.stripe_pool(arguments["feature_map"], 3, arguments["p"])
    assert local_features.equal(pooled)
    expected = cge_kernels.revise_logits(arguments["logits"], pooled, arguments["memory"])
    torch.testing.assert_close(revised, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_same_bits_from_run_to_run(backend):
    first, second = (check_parity("revise_logits_one_pass", draw(p=3.0), backend) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


def test_it_is_one_launch():
    kernels = []
    hook = cge_kernels.launching(lambda launch: (kernels.append(launch.kernel.fn.__name__), launch.run()))
    with cge_kernels.backend("triton"), hook:
        cge_kernels.revise_logits_one_pass(**draw())
    assert kernels == ["one_pass_kernel"]


def test_the_grid_has_as_many_programs_as_are_resident():
    """What a multiprocessor holds of them, cge_kernels.tools.compile checks."""
    launches = []
    arguments = {
        name: value.cpu() if isinstance(value, torch.Tensor) else value
        for name, value in draw(torch.bfloat16, batch=64, classes=20).items()
    }
    for multiprocessors, programs in (1, 1), (4, 12), (1000, 64):
        target = cge_kernels.Target("cuda", 90, 32, multiprocessors, 227 * 1024)
        with cge_kernels.backend("triton"), cge_kernels.launching(launches.append, target):
            cge_kernels.revise_logits_one_pass(**arguments)
        assert launches[-1].grid[0] == programs  # 64: one for each sample, whose channels are one tile
        assert launches[-1].options["launch_cooperative_grid"]
    counters = [launch.args["counter_ptr"] for launch in launches]
    assert len({counter.data_ptr() for counter in counters}) == 3  # a fresh counter for each call
    assert all(counter.dtype == torch.int32 and counter.tolist() == [0] for counter in counters)


@pytest.mark.skipif(not GPU, reason="the interpreter has one program")
def test_many_programs_meet_at_the_barrier():
    arguments = draw(batch=64, channels=256, height=24, width=8, classes=1041)
    first = cge_kernels.revise_logits_one_pass(**arguments)
    for _ in range(50):
        again = cge_kernels.revise_logits_one_pass(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

"""Launches as data: the hook, the target, and addresses beyond 2^31."""

import threading
from unittest import mock

import numpy as np
import pytest
import torch
from support import GPU
from torch.nn.functional import normalize

import cge_kernels
from cge_kernels import Launch, Target
from cge_kernels.common import tiles as configurations
from cge_kernels.common.launch import INTERPRETER, current_target, float32_precision

H100 = Target("cuda", 90, 32, 132, 227 * 1024)
A100 = Target("cuda", 80, 32, 108, 163 * 1024)
T4 = Target("cuda", 75, 32, 40, 64 * 1024)
MI300X = Target("hip", "gfx942", 64, 304, 64 * 1024)


def step():
    """Every operator, forward and backward."""
    feature_map = torch.rand(3, 4, 5, 2, requires_grad=True)
    memory = normalize(torch.rand(2, 7, 4), dim=2)
    p = torch.tensor(3.0, requires_grad=True)
    _, local_features = cge_kernels.stripe_pool(feature_map, 2, p)
    cge_kernels.revise_logits(torch.rand(3, 7), local_features, memory).sum().backward()
    cge_kernels.write_memory_(memory, local_features, torch.tensor([0, 1, 0]), 0.5)


def collect(call, target=None):
    launches = []
    with cge_kernels.backend("triton"), cge_kernels.launching(launches.append, target):
        call()
    return launches


def test_the_hook_sees_every_launch_with_its_arguments_and_runs_none():
    launches = collect(step)
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        "stripe_pool_kernel",
        "prepare_kernel",
        "revise_kernel",
        "grad_scores_kernel",
        "grad_local_kernel",
        "stripe_pool_backward_kernel",
        "write_memory_kernel",
    ]
    first = launches[0]
    assert isinstance(first, Launch)
    assert first.args["map_pointer"].shape == (3, 4, 5, 2)
    assert first.constants["STRIPES"] == 2
    assert set(first.options) == {"num_warps", "num_stages"}
    assert len(first.grid) == 1


def test_launches_can_be_run_later_by_hand():
    feature_map = torch.rand(3, 4, 5, 2)
    launches = []
    with cge_kernels.backend("triton"), cge_kernels.launching(launches.append):
        global_feature, _ = cge_kernels.stripe_pool(feature_map, 2)
    if GPU:
        pytest.skip("these tensors are on the CPU")
    launches[0].run()
    torch.testing.assert_close(global_feature, feature_map.mean(dim=(2, 3)))


def test_hook_and_backend_hold_in_other_threads():
    names = []
    with cge_kernels.backend("triton"), cge_kernels.launching(lambda launch: names.append(launch.kernel.fn.__name__)):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert "stripe_pool_backward_kernel" in names


def test_hooks_nest_and_end_also_after_an_error():
    outer, inner = [], []
    with cge_kernels.backend("triton"), cge_kernels.launching(outer.append):
        with pytest.raises(ValueError, match="stripes"), cge_kernels.launching(inner.append):
            cge_kernels.stripe_pool(torch.rand(1, 1, 1, 1), 2)
        cge_kernels.stripe_pool(torch.rand(1, 1, 1, 1), 1)
    assert (len(outer), len(inner)) == (1, 0)


def test_the_target_decides_tiles_and_grid():
    def revise():
        cge_kernels.revise_logits(torch.rand(64, 1041), torch.rand(64, 3, 8), torch.rand(3, 1041, 8).bfloat16())

    small = collect(revise, Target("cuda", 80, 32, 4, 163 * 1024))[1]
    large = collect(revise, H100)[1]
    assert large.constants["BLOCK_N"] < small.constants["BLOCK_N"]
    assert large.grid[0] > small.grid[0]
    assert current_target(torch.rand(1)) == INTERPRETER


@pytest.mark.parametrize(
    ("target", "wanted"),
    [(H100, "tf32"), (A100, "tf32"), (MI300X, "tf32"), (T4, "ieee"), (Target("hip", "gfx90a", 64, 110, 65536), "ieee")],
)
def test_float32_products_follow_torchs_setting_as_far_as_the_target_can(target, wanted):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert float32_precision(target) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert float32_precision(target) == wanted
    finally:
        torch.set_float32_matmul_precision(before)


def test_scratch_stays_in_its_budget(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "1")
    chunk = configurations.chunk_of_classes(batch=64, stripes=3, classes=100_000)
    assert chunk % 16 == 0
    assert 64 * 3 * chunk * 4 <= 1 << 20 < 64 * 3 * (chunk + 16) * 4
    assert configurations.chunk_of_classes(batch=64, stripes=3, classes=5) == 16
    assert configurations.chunk_of_classes(batch=10**6, stripes=3, classes=10**6) == 16  # one tile at least


def highest_addresses(launch: Launch, program: int) -> dict[str, int]:
    """Runs one program with loads that give zeros and stores that go nowhere.

    Returns the highest address of each access, in bytes above the base of the tensor argument whose line it is; tensors
    are told apart by base addresses 2^50 bytes apart, which nothing dereferences.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    bases, highest = {}, {}
    args = dict(launch.args)
    for number, (name, value) in enumerate(args.items(), start=1):
        if isinstance(value, torch.Tensor):
            bases[name] = number << 50

    def note(pointers, mask):
        for address in np.unique(np.asarray(pointers.data).reshape(-1)[np.asarray(mask.data).reshape(-1)]):
            name = next(name for name, base in bases.items() if base == int(address) >> 50 << 50)
            highest[name] = max(highest.get(name, 0), int(address) - bases[name])

    def load(self, pointers, mask, other, *_):
        note(pointers, mask)
        dtype = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(dtype)), dtype)

    def store(self, pointers, value, mask, *_):
        note(pointers, mask)

    original = interpreter._implicit_cvt

    def with_base(value):
        converted = original(value)
        for name, tensor in launch.args.items():
            if isinstance(tensor, torch.Tensor) and value is args[name]:
                converted.handle.data[...] = bases[name]
        return converted

    with (
        np.errstate(all="ignore"),  # what is computed from the zeros does not matter
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
        mock.patch.object(builder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", (program, 0, 0))),
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", lambda self, a, kwargs: (list(a), kwargs)),
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"),
        mock.patch.object(interpreter, "_implicit_cvt", with_base),
    ):
        launch.kernel[(1,)](**launch.args, **launch.constants)
    return highest


@pytest.mark.skipif(GPU, reason="addresses are seen in the interpreter")
def test_rows_beyond_two_to_the_31_elements_have_64_bit_offsets():
    # n * N * C = 3 * 400,000 * 2,048 = 2.5e9 elements; the tensors that stand for them are tiny, only numbers large.
    batch, stripes, classes, channels = 2, 3, 400_000, 2048
    revise, grad_local = (collect(step)[index] for index in (2, 4))
    sizes = {"batch": batch, "classes": classes, "channels": channels, "memory_stride_i": classes * channels}
    last = ((stripes - 1) * classes + classes - 1) * channels + channels - 1

    revise.args.update(sizes, score_row=classes, operand_stride_b=stripes * channels, operand_stride_i=channels)
    revise.constants.update(STRIPES=stripes, BLOCK_K=1024)
    tiles = -(-classes // revise.constants["BLOCK_N"])
    found = highest_addresses(revise, tiles - 1)
    assert found["memory_pointer"] == 4 * last
    assert found["scores_pointer"] == 4 * (((stripes - 1) * batch + batch - 1) * classes + classes - 1)

    grad_local.args.update(sizes, score_row=classes, batch=1)
    grad_local.constants.update(STRIPES=stripes, BLOCK_K=32768)
    channel_tiles = -(-channels // grad_local.constants["BLOCK_C"])
    found = highest_addresses(grad_local, channel_tiles * stripes - 1)
    assert found["memory_pointer"] == 4 * last

    write = collect(step)[6]
    write.args.update(classes=classes, channels=channels)
    write.constants.update(BLOCK_C=channels)
    # every loaded label is 0, so the first program writes row 0 of stripe 0, and the last sample of a batch of one
    write.args.update(batch=1)
    write.constants.update(STRIPES=stripes)
    found = highest_addresses(write, stripes - 1)
    assert found["memory_pointer"] == 4 * ((stripes - 1) * classes * channels + channels - 1)


@pytest.mark.skipif(GPU, reason="addresses are seen in the interpreter")
def test_maps_beyond_two_to_the_31_elements_have_64_bit_offsets():
    forward, backward = (collect(step)[index] for index in (0, 5))
    batch, channels, plane = 6000, 2048, 10  # 1.2e8 elements a sample would be 2.5e9 in all with a plane of 200
    strides = {"stride_b": channels * 200, "stride_c": 200, "stride_h": 2, "stride_w": 1}
    tiles = -(-channels // forward.constants["BLOCK_C"])
    forward.args.update(strides, channels=channels)
    found = highest_addresses(forward, batch * tiles - 1)
    assert found["map_pointer"] == 4 * (((batch - 1) * channels + channels - 1) * 200 + plane - 1)
    backward.args.update(strides, channels=channels, **{f"gradient_{name}": value for name, value in strides.items()})
    tiles = -(-channels // backward.constants["BLOCK_C"])
    found = highest_addresses(backward, batch * tiles - 1)
    assert found["grad_map_pointer"] == 4 * (((batch - 1) * channels + channels - 1) * 200 + plane - 1)

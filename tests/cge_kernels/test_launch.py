"""Launches as data: the hook, the target, and addresses beyond 2^31."""

import threading
from math import prod
from unittest import mock

import numpy as np
import pytest
import torch
from support import GPU, KERNEL_DEVICE
from torch.nn.functional import normalize

import cge_kernels
from cge_kernels import Launch, Target
from cge_kernels.common.budget import chunk_of_classes
from cge_kernels.common.device_functions import jit, tl
from cge_kernels.common.launch import HAS_FP32_PRECISION, INTERPRETER, Tiles, bind, current_target, float32_precision
from cge_kernels.common.plan import Plan
from cge_kernels.tools.sample_calls import Shape, call_cross_entropy, call_pooling, call_revision, call_write

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
        "cast_and_norm_kernel",
        "revise_kernel",
        "grad_scores_kernel",
        "grad_local_kernel",
        "stripe_pool_backward_kernel",
        "write_memory_kernel",
    ]
    first = launches[0]
    assert isinstance(first, Launch)
    assert first.args["map_ptr"].shape == (3, 4, 5, 2)
    assert first.constants["STRIPES"] == 2
    assert set(first.options) == {"num_warps", "num_stages", "enable_fp_fusion"}
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


@pytest.mark.skipif(not HAS_FP32_PRECISION, reason="torch 2.8 has no other setting")
def test_operators_run_under_torchs_newer_setting_and_follow_it():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert float32_precision(H100) == setting
            cge_kernels.stripe_pool(torch.rand(1, 2, 3, 1), 1)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_scratch_stays_in_its_budget(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "1")
    assert cge_kernels.scratch_bytes() == 1 << 20
    chunk = chunk_of_classes(batch=64, stripes=3, classes=100_000)
    assert chunk % 16 == 0
    assert 64 * 3 * chunk * 4 <= 1 << 20 < 64 * 3 * (chunk + 16) * 4
    assert chunk_of_classes(batch=64, stripes=3, classes=5) == 16
    assert chunk_of_classes(batch=10**6, stripes=3, classes=10**6) == 16  # one tile at least


@jit
def scaled_kernel(x_ptr, y_ptr, factor, x_stride_0, x_stride_1, y_stride_1, COUNT: tl.constexpr):  # noqa: N803
    for _ in range(tl.load(x_ptr)):  # a number that no one knows when the kernel is compiled
        tl.store(y_ptr, tl.load(y_ptr) + factor * COUNT)


def test_bind_fills_strides_and_scalars_by_the_parameters_names():
    x = torch.empty(3, 5).T
    bound = bind(scaled_kernel, {"x": x, "y": None}, factor=2, COUNT=4)
    assert bound == {"factor": 2, "x_stride_0": 1, "x_stride_1": 5, "y_stride_1": 0, "COUNT": 4}


@pytest.mark.parametrize(
    ("names", "scalars", "message"),
    [
        (("x",), {"factor": 2}, "scaled_kernel takes x_ptr, y_ptr first, got tensors x$"),
        (("y", "x"), {"factor": 2}, "scaled_kernel takes x_ptr, y_ptr first, got tensors y, x"),
        (("x", "y", "z"), {"factor": 2}, "scaled_kernel takes x_ptr, y_ptr first, got tensors x, y, z"),
        (("x", "y"), {}, "scaled_kernel wants factor, got x, y"),
    ],
)
def test_bind_names_what_is_missing_and_what_is_unknown(names, scalars, message):
    with pytest.raises(TypeError, match=message):
        bind(scaled_kernel, dict.fromkeys(names, torch.empty(1, 1)), **scalars)


def test_a_kernel_may_loop_as_often_as_a_tensor_says():
    """The interpreters of Triton before 3.7 need help where NumPy, from 2.5 on, makes no int of an array."""
    count = torch.tensor([[3]], dtype=torch.int32, device=KERNEL_DEVICE)
    total = torch.zeros(1, 1, dtype=torch.int32, device=KERNEL_DEVICE)
    with Plan() as plan:
        plan.launch(scaled_kernel, {"x": count, "y": total}, lambda: (1, Tiles({"COUNT": 4}, 1), {"factor": 2}))
    assert total.item() == 3 * 2 * 4


def highest_addresses(launch: Launch, integer: int = 0) -> dict[str, int]:
    """Runs the last program with loads that give zeros (of integers the one given) and stores that go nowhere.

    Returns the highest address of each tensor argument that it touches, in bytes above the tensor's own; tensors are
    told apart by base addresses 2^50 bytes apart, which nothing dereferences, so that they need no memory.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    tensors = [name for name, value in launch.args.items() if isinstance(value, torch.Tensor)]
    bases = {name: number << 50 for number, name in enumerate(tensors, start=1)}
    highest = {}

    def note(pointers, mask):
        addresses = np.asarray(pointers.data).reshape(-1)[np.asarray(mask.data).reshape(-1)]
        if addresses.size:
            number, offset = divmod(int(addresses.max()), 1 << 50)
            name = tensors[number - 1]
            highest[name] = max(highest.get(name, 0), offset)

    def load(self, pointers, mask, other, *_):
        note(pointers, mask)
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        fill = integer if np.issubdtype(dtype, np.integer) else 0
        return interpreter.TensorHandle(np.full(pointers.data.shape, fill, dtype), pointers.get_element_ty())

    def store(self, pointers, value, mask, *_):
        note(pointers, mask)

    original = interpreter._implicit_cvt

    def with_base(value):
        converted = original(value)
        for name in tensors:
            if value is launch.args[name]:
                converted.handle.data[...] = bases[name]
        return converted

    last = prod(launch.grid) - 1
    with (
        np.errstate(all="ignore"),  # what is computed from the zeros does not matter
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
        mock.patch.object(builder, "set_grid_idx", lambda self, *_: setattr(self, "grid_idx", (last, 0, 0))),
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", lambda self, a, kwargs: (list(a), kwargs)),
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"),
        mock.patch.object(interpreter, "_implicit_cvt", with_base),
    ):
        launch.kernel[(1,)](**launch.args, **launch.constants)
    return highest


CLASSES = 1_200_000
CALLS = {
    # a map of 6000 * 2048 * 24 * 8 = 2.4e9 elements
    "stripe_pool": lambda: call_pooling(Shape(6000, 2048, 1), torch.float32, every_variant=False),
    # a memory of which each stripe has 1,200,000 * 2,048 = 2.5e9 elements
    "revise_logits": lambda: call_revision(Shape(2, 2048, CLASSES), torch.float32, torch.float32, every_variant=False),
    "revised_cross_entropy": lambda: call_cross_entropy(
        Shape(2, 2048, CLASSES), torch.float32, torch.float32, every_variant=False
    ),
    "write_memory_": lambda: call_write(Shape(1, 2048, CLASSES), torch.float32),
}


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="addresses are seen in the interpreter")
@pytest.mark.parametrize("operator", CALLS)
def test_what_lies_beyond_two_to_the_31_elements_has_64_bit_offsets(operator):
    number = 0
    for seen in collect(CALLS[operator]):
        large = {
            name: value
            for name, value in seen.args.items()
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 4 * 2**31
        }
        if not large or "launch_cooperative_grid" in seen.options:  # a barrier needs memory
            continue
        if "BLOCK_K" in seen.constants:  # fewer and longer steps
            seen.constants["BLOCK_K"] = 1024 if "BLOCK_N" in seen.constants else 65536
        found = highest_addresses(seen, integer=CLASSES - 1)
        touched = large.keys() & found.keys()  # average pooling's backward only writes
        assert touched, seen.kernel.fn.__name__
        number += 1
        for name in touched:
            tensor = large[name]
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            assert found[name] == last * tensor.element_size(), (seen.kernel.fn.__name__, name)
    assert number

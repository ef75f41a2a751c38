"""What is remembered from call to call never shows: any sequence of calls launches what it would without memory."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GPU, KERNEL_DEVICE

import cge_kernels
from cge_kernels import Target
from cge_kernels.common import plan, tiles
from cge_kernels.common.plan import ALIGNMENT, Call, Layout, Piece, Plan

H100 = Target("cuda", 90, 32, 132, 227 * 1024)
A100 = Target("cuda", 80, 32, 108, 163 * 1024)
DTYPES = [torch.float32, torch.bfloat16]


def laid_out(shape, dtype, order, offset):
    """Random numbers in this order of axes in memory, `offset` numbers into their storage."""
    permuted = [shape[axis] for axis in order]
    numbers = torch.rand(offset + torch.Size(permuted).numel()).to(dtype)[offset:].view(permuted)
    return numbers.permute([order.index(axis) for axis in range(len(shape))])


def what_is_launched(call, target):
    """All that a launch says but the tensors' numbers and addresses."""
    launches = []

    def note(launch):
        args = {
            name: (value.shape, value.stride(), value.dtype, value.data_ptr() % 16)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in launch.args.items()
        }
        launches.append((launch.kernel, launch.grid, args, launch.constants, launch.options))

    with cge_kernels.backend("triton"), cge_kernels.launching(note, target):
        call()
    return launches


@st.composite
def operator_calls(draw):
    """One call of an operator, forward and backward, with the target that it runs for."""
    batch, channels, stripes, classes = (draw(st.integers(1, top)) for top in (3, 4, 2, 5))
    dtype, memory_dtype, offset = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3))
    order = draw(st.permutations(range(4)))
    p = draw(st.sampled_from([None, 3.0]))
    local = laid_out((batch, stripes, channels), dtype, draw(st.permutations(range(3))), offset)
    memory = torch.rand(stripes, classes, channels).to(memory_dtype)
    labels = torch.zeros(batch, dtype=torch.int64)
    smoothing, local_gradient = draw(st.sampled_from([0.0, 0.1])), draw(st.booleans())

    def pool():
        feature_map = laid_out((batch, channels, 3, 2), dtype, list(order), offset).requires_grad_()
        sum(result.sum() for result in cge_kernels.stripe_pool(feature_map, stripes, p)).backward()

    def revise():
        logits = torch.rand(batch, classes, requires_grad=True)
        cge_kernels.revise_logits(logits, local.clone().requires_grad_(), memory, local_gradient).sum().backward()

    def loss():
        features, weight = torch.rand(batch, 3, requires_grad=True), torch.rand(classes, 3, requires_grad=True)
        learnt = local.clone().requires_grad_()
        arguments = features, weight, learnt, memory, labels, smoothing, local_gradient
        cge_kernels.revised_cross_entropy(*arguments)[0].sum().backward()

    def write():
        cge_kernels.write_memory_(memory.float(), local, labels, 0.5, memory)

    operator = draw(st.sampled_from([pool, revise, loss, write]))
    precision, budget = draw(st.sampled_from(["highest", "high"])), draw(st.sampled_from(["256", "0"]))

    def call():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            with mock.patch.dict("os.environ", CGE_SCRATCH_MB=budget):
                operator()
        finally:
            torch.set_float32_matmul_precision(before)

    return call, draw(st.sampled_from([H100, A100]))


@settings(max_examples=40, deadline=None)
@given(calls=st.lists(operator_calls(), min_size=2, max_size=6))
def test_any_sequence_of_calls_launches_what_each_would_alone(calls):
    remembered = [what_is_launched(call, target) for call, target in calls * 2]
    alone = []
    for call, target in calls:
        plan.forget_calls()
        alone.append(what_is_launched(call, target))
    assert remembered == alone * 2


def test_a_call_like_an_earlier_one_prepares_nothing():
    feature_map = torch.rand(2, 3, 4, 2)
    first = what_is_launched(lambda: cge_kernels.stripe_pool(feature_map, 2), H100)
    with mock.patch.object(plan, "Prepared", side_effect=AssertionError("prepared again")):
        second = what_is_launched(lambda: cge_kernels.stripe_pool(feature_map.clone(), 2), H100)
    assert first == second


def test_nothing_outlives_a_change_of_tiles_that_is_told():
    feature_map = torch.rand(1, 70, 4, 2)
    (before,) = what_is_launched(lambda: cge_kernels.stripe_pool(feature_map, 2), H100)
    wider = tiles.Tiles({"BLOCK_C": 64, "BLOCK_S": 8}, num_warps=2)
    with mock.patch.dict(tiles.POOL, positions=wider):
        plan.forget_calls()
        (after,) = what_is_launched(lambda: cge_kernels.stripe_pool(feature_map, 2), H100)
    plan.forget_calls()
    assert before[1] > after[1]
    assert after[4]["num_warps"] == 2


def test_an_error_in_the_midst_is_not_remembered():
    feature_map = torch.rand(1, 2, 2, 5)
    with mock.patch.object(plan.launch, "bind", side_effect=RuntimeError("in the midst")), pytest.raises(RuntimeError):
        what_is_launched(lambda: cge_kernels.stripe_pool(feature_map, 1), H100)
    assert len(what_is_launched(lambda: cge_kernels.stripe_pool(feature_map, 1), H100)) == 1


def test_backends_take_turns_on_the_same_tensors():
    feature_map = torch.rand(2, 3, 4, 2, device=KERNEL_DEVICE)
    pooled = {}
    for name in ("triton", "reference", "cpu", "triton"):
        with cge_kernels.backend(name):
            pooled[name] = cge_kernels.stripe_pool(feature_map, 2)[0]
    assert pooled["triton"].allclose(pooled["cpu"])
    assert pooled["reference"].allclose(pooled["cpu"])


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(plan, "MAX_CALLS", 4)
    for width in range(1, 12):
        cge_kernels.stripe_pool(torch.rand(1, 1, 2, width), 1)
    assert len(plan._calls) <= 4


def test_pieces_lie_apart_and_aligned():
    pieces = [Piece((3, 5), torch.float32), Piece((1,), torch.int32), Piece((2, 3), torch.float32, (1, 16))]
    layout = Layout(pieces)
    assert all(offset % ALIGNMENT == 0 for offset in layout.offsets)
    ends = [offset + piece.bytes for offset, piece in zip(layout.offsets, pieces, strict=True)]
    assert all(end <= start for end, start in zip(ends, [*layout.offsets[1:], layout.bytes], strict=True))
    assert pieces[2].tensor(torch.empty(0)).stride() == (1, 16)
    assert pieces[2].bytes == (1 + 1 + 2 * 16) * 4


def test_compiled_launches_are_repeated_on_addresses():
    """Where kernels are compiled, a later call launches them directly, and scratch memory is one allocation."""
    runs, like = [], torch.empty(0)

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: runs.append((grid, arguments))

    class Kernel:
        arg_names = ["x_ptr", "y_ptr", "count", "x_stride_0", "BLOCK"]  # noqa: RUF012
        fn = None

        def __getitem__(self, grid):
            return lambda **arguments: Compiled()

    def once(call):
        with Plan(call) as one:
            (y,) = one.scratch(like, lambda: [Piece((4,), torch.float32)])
            prepared = (2, tiles.Tiles({"BLOCK": 8}, 1), {"count": 4})
            one.launch(Kernel(), {"x": torch.ones(3), "y": y}, lambda: prepared)
        return y

    with mock.patch.object(plan.launch, "is_direct", return_value=True):
        call = Call([like])
        assert isinstance(once(call), torch.Tensor)
        address = once(call)
    assert isinstance(address, int)
    ((grid, (x, y, *rest)),) = runs
    assert (grid, y, rest) == ((2, 1, 1), address, [4, 1, 8])
    assert x.equal(torch.ones(3))


@pytest.mark.skipif(not GPU, reason="there is no GPU")
def test_on_a_gpu_the_second_call_gives_the_same_bits():
    feature_map = torch.rand(4, 32, 6, 2, device="cuda")
    first, second = (cge_kernels.stripe_pool(feature_map, 3, 3.0) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))

"""revised_cross_entropy on both sides of the border where its products are split over classifiers and channels."""

from dataclasses import replace

import pytest
import torch
from error_budget import check_parity
from hypothesis import given
from hypothesis import strategies as st
from support import GPU, KERNEL_DEVICE, draw_sample

import cge_kernels
from cge_kernels import Launch, Target
from cge_kernels.common import tiles
from cge_kernels.common.launch import current_target
from cge_kernels.common.plan import Plan, forget_calls
from cge_kernels.common.tiles import cdiv, parts_of_channels, products_tiles
from cge_kernels.cross_entropy import cpu
from cge_kernels.cross_entropy.forward import launch_forward
from cge_kernels.cross_entropy.inputs import Inputs
from cge_kernels.cross_entropy.op import cross_entropy_op

FLAGS = ("correct", "stripe_correct")
SPLIT = ["products_kernel", "loss_kernel"]
STREAMED = ["cast_and_norm_kernel", "cross_entropy_kernel", "reduce_tiles_kernel"]
BACKWARD = ["grad_logits_kernel", "normalize_backward_kernel"]
H100 = Target("cuda", 90, 32, 132, 227 * 1024)


def multiprocessors(number, launched=None):
    """Inside, kernels run as if the GPU had so many; their names go to a list."""

    def run(launch: Launch) -> None:
        if launched is not None:
            launched.append(launch.kernel.__name__)
        launch.run()

    target = replace(current_target(torch.empty(0, device=KERNEL_DEVICE)), multiprocessors=number)
    return cge_kernels.launching(run, target)


@pytest.fixture(params=[1000, 1], ids=["split", "streamed"])
def side(request):
    """Runs the test on each side of the border, and says which."""
    with cge_kernels.backend("triton"), multiprocessors(request.param):
        yield "split" if request.param > 1 else "streamed"


@pytest.fixture
def split():
    """Runs the test where the products are split."""
    with cge_kernels.backend("triton"), multiprocessors(1000):
        yield


@pytest.fixture
def blocks_of_128(monkeypatch):
    """The loss takes so many classes and channels at once."""
    forget_calls()
    monkeypatch.setattr(tiles, "LOSS_TILE", 1)
    yield
    forget_calls()


@pytest.fixture
def precision(request):
    """Sets the precision of float32 products for the time of the test."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def draw(batch=5, stripes=3, classes=19, channels=33, **others):
    """Arguments, float32; the features are small, so that a 16-bit memory tells the logits apart."""
    sample = draw_sample(batch, stripes, classes, channels, **others)
    arguments = {name: getattr(sample, name) for name in ("features", "weight", "local_features", "memory", "labels")}
    return arguments | {"features": arguments["features"] / 8}


def forward_of(inputs, label_smoothing):
    *tensors, first_class, all_classes = inputs
    with Plan() as plan:
        return launch_forward(plan, *tensors, label_smoothing, True, first_class, all_classes)


def inputs_of(arguments, first_class=0, all_classes=None):
    all_classes = all_classes or arguments["memory"].shape[1]
    return Inputs(**arguments, bias=None, first_class=first_class, all_classes=all_classes)


@pytest.mark.parametrize(
    ("memory_dtype", "precision"),
    [(torch.float32, "highest"), (torch.float32, "high"), (torch.bfloat16, "highest"), (torch.float16, "highest")],
    indirect=["precision"],
)
@pytest.mark.parametrize("sizes", [(1, 1, 17, 33), (5, 3, 19, 70), (17, 2, 40, 16)])
@pytest.mark.usefixtures("precision", "side")
def test_loss_flags_and_gradients(sizes, memory_dtype):
    arguments = draw(*sizes)
    arguments["memory"] = arguments["memory"].to(memory_dtype)
    check_parity("revised_cross_entropy", arguments, "triton", skip=() if memory_dtype == torch.float32 else FLAGS)


@pytest.mark.parametrize(
    ("label_smoothing", "local_gradient", "with_bias"), [(0.0, True, True), (0.1, False, True), (0.0, False, False)]
)
@pytest.mark.usefixtures("side")
def test_bias_detached_weights_and_smoothing(label_smoothing, local_gradient, with_bias):
    options = {"local_gradient": local_gradient, "label_smoothing": label_smoothing}
    bias = {"bias": torch.linspace(-1, 1, 19, device=KERNEL_DEVICE)} if with_bias else {}
    check_parity("revised_cross_entropy", draw(3) | options | bias, "triton")


@pytest.mark.usefixtures("split")
def test_more_channels_of_the_classifier_than_of_the_memory_and_any_strides():
    arguments = draw(5, 3, 19, 20, feature_channels=90)
    strided = {
        "features": arguments["features"].T.contiguous().T,
        "weight": arguments["weight"].T.contiguous().T,
        "local_features": arguments["local_features"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    check_parity("revised_cross_entropy", arguments | strided, "triton")


@pytest.mark.usefixtures("side")
def test_labels_out_of_range_are_not_a_number_and_nothing_about_them_is_correct():
    arguments = draw(4)
    arguments["labels"][1:3] = torch.tensor([-1, 19])
    loss, _, correct, stripe_correct, *_ = forward_of(inputs_of(arguments), 0.1)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert not correct[1:3].any()
    assert not stripe_correct[1:3].any()


@pytest.mark.parametrize("first_class", [0, 7])
@pytest.mark.usefixtures("side")
def test_statistics_of_a_shard(first_class):
    arguments = draw(6)
    arguments["labels"] = torch.tensor([0, 6, 7, 18, 25, 26], device=KERNEL_DEVICE)
    inputs = inputs_of(arguments, first_class, 30)
    *ours, saved_logits, inv_norm = forward_of(inputs, None)
    expected, expected_logits, expected_norm = cpu.revised_statistics(inputs)
    torch.testing.assert_close(tuple(ours), tuple(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saved_logits[:, :19, :6], expected_logits[:, :19, :6], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inv_norm, expected_norm)


@pytest.mark.usefixtures("split", "blocks_of_128")
def test_ties_go_to_the_lowest_class_also_of_another_block():
    weight, memory = torch.ones(300, 2), torch.zeros(1, 300, 2)
    weight[:3] = 0.5
    arguments = (torch.ones(3, 2), weight, torch.ones(3, 1, 2), memory, torch.tensor([3, 0, 200]))
    arguments = [tensor.to(KERNEL_DEVICE) for tensor in arguments]
    _, correct, stripe_correct = cge_kernels.revised_cross_entropy(*arguments)
    assert correct.tolist() == [True, False, False]
    assert stripe_correct.tolist() == [[False], [True], [False]]


@pytest.mark.usefixtures("split", "blocks_of_128")
def test_more_classes_and_channels_than_a_block_of_the_loss():
    check_parity("revised_cross_entropy", draw(1, 3, 150, 150), "triton")


@pytest.mark.usefixtures("split")
def test_the_same_bits_from_run_to_run():
    arguments = draw(5, 3, 35, 70)
    first, second = (forward_of(inputs_of(arguments), 0.1)[:4] for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("split")
def test_nan_stays_in_its_sample():
    arguments = draw()
    arguments["features"][2, 1] = torch.nan
    assert cge_kernels.revised_cross_entropy(**arguments)[0].isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("number", "megabytes", "forward"), [(1000, "256", SPLIT), (1, "256", STREAMED), (1000, "0", None)]
)
def test_what_is_launched(number, megabytes, forward, monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", megabytes)
    arguments, launched = draw(), []
    arguments["memory"] = arguments["memory"].bfloat16()
    arguments["local_features"].requires_grad_()
    with cge_kernels.backend("triton"), multiprocessors(number, launched):
        cge_kernels.revised_cross_entropy(**arguments)[0].sum().backward()
    if forward:
        assert launched == forward + BACKWARD
    else:  # what is not kept cannot be split: the loss streams over the classes, and so does the backward
        assert "products_kernel" not in launched
        assert launched.count("cross_entropy_kernel") >= 2


@pytest.mark.skipif(GPU, reason="opcheck compares with the CPU's strides")
@pytest.mark.usefixtures("split")
def test_results_lie_as_torch_compile_expects_them():
    arguments = tuple(draw().values())
    torch.library.opcheck(cross_entropy_op, (*arguments, None, 0.1, True), test_utils="test_faketensor")


def test_the_border_is_where_the_widest_tiles_fill_the_machine():
    def parts(classes, dtype=torch.bfloat16, batch=64, channels=2048):
        return parts_of_channels(H100, dtype, batch, 3, classes, channels)

    assert parts(1041) == 2  # 17 tiles x 4 classifiers x 2 on 132 multiprocessors
    assert parts(64 * 131) == 1
    assert parts(64 * 131 + 1) == 0
    assert parts(1041, batch=512) == 0
    assert parts(100, channels=64) == 1  # one step of the product is not split
    assert parts(16 * 131, torch.float32) == 1
    assert parts(16 * 131 + 1, torch.float32) == 0


@given(
    st.integers(1, 1024), st.integers(1, 8), st.integers(1, 10**5), st.integers(1, 8192), st.integers(1, 400),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_parts_are_as_few_as_fill_the_machine(batch, stripes, classes, channels, number, dtype):
    target = replace(H100, multiprocessors=number)
    parts = parts_of_channels(target, dtype, batch, stripes, classes, channels)
    blocks = products_tiles(target, dtype, batch)
    programs = cdiv(batch, blocks["BLOCK_B"]) * cdiv(classes, blocks["BLOCK_N"]) * (stripes + 1)
    steps = cdiv(channels, blocks["BLOCK_K"])
    assert 0 <= parts <= min(steps, tiles.MOST_PARTS)
    if parts > 1:
        assert programs * (parts - 1) < number
    if parts and parts < min(steps, tiles.MOST_PARTS):
        assert programs * parts >= number

"""revised_cross_entropy on every backend: loss, arg maxima and gradients, chunks of classes, ties, extremes."""

from dataclasses import replace
from math import prod

import pytest
import torch
from error_budget import check_parity
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GPU, KERNEL_DEVICE, draw_sample
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import cge_kernels
import cge_reference
from cge_kernels.common.launch import current_target
from cge_kernels.cross_entropy import cpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLAGS = ("correct", "stripe_correct")


def draw(batch=5, stripes=3, classes=19, channels=6, feature_channels=None, seed=0):
    """Arguments, float32."""
    sample = draw_sample(batch, stripes, classes, channels, feature_channels=feature_channels, seed=seed)
    return {name: getattr(sample, name) for name in ("features", "weight", "local_features", "memory", "labels")}


def check(arguments, backend, **options):
    return check_parity("revised_cross_entropy", arguments, backend, **options)


def differentiated(arguments):
    """Loss and gradients of its sum."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("features", "weight", "local_features")}
    loss = cge_kernels.revised_cross_entropy(**arguments | leaves)[0]
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("memory_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_flags_and_gradients_in_every_dtype(dtype, memory_dtype, backend):
    arguments = draw(5, 3, 19, 17, feature_channels=21)
    arguments["features"] = arguments["features"] / 8
    cast = {name: arguments[name].to(dtype) for name in ("features", "weight", "local_features")}
    cast["memory"] = arguments["memory"].to(memory_dtype)
    # where operands are rounded, rounding decides between neighbours
    check(arguments | cast, backend, skip=() if memory_dtype == torch.float32 else FLAGS)


def test_float64_on_the_cpu():
    arguments = {name: value.double() if value.is_floating_point() else value for name, value in draw(5, 3, 37).items()}
    check(arguments, "cpu")


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(2, 40), st.integers(1, 40), st.integers(1, 40)),
    backend=st.sampled_from(["triton", "cpu"]),
)
def test_odd_sizes(sizes, backend):
    check(draw(*sizes), backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "backend"), [(2, "triton"), (3, "triton"), (257, "triton"), (2, "cpu"), (1041, "cpu"), (4999, "cpu")]
)
def test_from_two_to_thousands_of_classes(classes, backend):
    check(draw(3, 2, classes, 4), backend)


@pytest.mark.slow
def test_thousands_of_classes_in_the_widest_tiles():
    arguments = draw(3, 2, 1999, 4)
    check(arguments | {"memory": arguments["memory"].bfloat16()}, "triton", skip=FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [15, 16, 17, 32, 33, 65, 200])
def test_without_scratch_classes_go_by_16_and_labels_at_the_edges_are_found(monkeypatch, classes, backend):
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    arguments = draw(6, 2, classes, 5)
    labels = torch.tensor([0, 15, 16, 63, 64, classes - 1], device=KERNEL_DEVICE).clamp(max=classes - 1)
    check(arguments | {"labels": labels}, backend)


@pytest.mark.parametrize("chunk", [1, 7, 18, 19])
def test_chunks_of_any_size_on_the_cpu(monkeypatch, chunk):
    monkeypatch.setattr(cpu, "CHUNK", chunk)
    check(draw(6) | {"labels": torch.tensor([0, 6, 7, 13, 14, 18], device=KERNEL_DEVICE)}, "cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("chunk", [7, 19])
def test_labels_of_small_dtypes_on_the_cpu(monkeypatch, chunk, dtype):
    monkeypatch.setattr(cpu, "CHUNK", chunk)
    check(draw(3) | {"labels": torch.tensor([0, 7, 18], dtype=dtype, device=KERNEL_DEVICE)}, "cpu")


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("local_gradient", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_bias_detached_weights_and_smoothing(local_gradient, label_smoothing, backend):
    options = {"local_gradient": local_gradient, "label_smoothing": label_smoothing}
    ours = check(draw(3) | options | {"bias": torch.linspace(-1, 1, 19, device=KERNEL_DEVICE)}, backend)
    assert (ours["grad_local_features"] is None) != local_gradient


@pytest.mark.slow
def test_more_samples_classes_and_channels_than_one_tile(backend):
    check(draw(67, 2, 67, 35), backend)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "classes"), [("triton", 70), ("cpu", 1041)])
def test_the_papers_channels_in_a_small_batch(backend, classes):
    arguments = draw(4, 3, classes, 2048)
    small = arguments["features"] / 100  # logits of a size that bfloat16 can tell apart
    check(arguments | {"features": small, "memory": arguments["memory"].bfloat16()}, backend, skip=FLAGS)


@pytest.mark.usefixtures("scratch")
def test_any_strides(backend):
    arguments = draw(5, 3, 19, 7)
    strided = {
        "features": arguments["features"].T.contiguous().T,
        "weight": arguments["weight"].T.contiguous().T,
        "local_features": arguments["local_features"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "labels": torch.stack([arguments["labels"]] * 2, dim=1)[:, 1],
    }
    check(arguments | strided, backend)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand_do_not_overflow(sign, any_backend):
    arguments = draw()
    arguments["features"] = sign * 1e4 * normalize(arguments["features"], dim=1)
    arguments["weight"] = normalize(arguments["weight"], dim=1)
    loss, *gradients = differentiated(arguments)
    exact = cge_reference.revised_cross_entropy(
        **{name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
    )[0]
    assert exact.max() > 1e3
    assert ((loss - exact).abs() <= 1e4 * 40 * 2.0**-24).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_class_never_seen_weighs_one_half(any_backend):
    arguments = draw()
    arguments["labels"][:] = 0
    arguments["memory"][:] = 0
    loss, _, stripe_correct = cge_kernels.revised_cross_entropy(**arguments, label_smoothing=0.0)
    logits = arguments["features"] @ arguments["weight"].T / 2
    expected = torch.nn.functional.cross_entropy(logits, arguments["labels"], reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert stripe_correct.all()  # every score is 0, and class 0 comes first


@pytest.mark.usefixtures("scratch")
def test_more_sigmoids_than_a_float32_holds_the_product_of(backend):
    arguments = draw(2, 140, 5, 3)
    arguments["memory"] = -normalize(arguments["local_features"][0].unsqueeze(1).expand(-1, 5, -1), dim=2)
    check(arguments, backend)


def test_features_of_length_zero_have_finite_gradients(any_backend):
    arguments = draw()
    arguments["local_features"][1] = 0
    assert all(value.isfinite().all() for value in differentiated(arguments))


def test_nan_stays_in_its_sample(any_backend):
    arguments = draw()
    arguments["features"][2, 1] = torch.nan
    loss = cge_kernels.revised_cross_entropy(**arguments)[0]
    assert loss.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.usefixtures("scratch")
def test_ties_go_to_the_lowest_index_across_tiles_and_chunks(any_backend):
    weight, memory = torch.ones(70, 2), torch.zeros(1, 70, 2)
    arguments = (torch.ones(3, 2), weight, torch.ones(3, 1, 2), memory, torch.tensor([0, 1, 40]))
    arguments = [tensor.to(KERNEL_DEVICE) for tensor in arguments]
    _, correct, stripe_correct = cge_kernels.revised_cross_entropy(*arguments)
    assert correct.tolist() == [True, False, False]
    assert stripe_correct.tolist() == [[True], [False], [False]]
    assert cge_kernels.stripe_correct(*arguments[2:]).equal(stripe_correct)


def test_the_same_bits_from_run_to_run(backend):
    first, second = (differentiated(draw(5, 3, 35, 33)) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_what_is_kept_gives_the_same_gradients_as_what_is_computed_again(monkeypatch, backend):
    arguments = draw(5, 3, 40)
    kept = differentiated(arguments)
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    for again, before in zip(differentiated(arguments), kept, strict=True):
        torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(4)), power=st.integers(-8, 8), backend=st.sampled_from(["triton", "cpu"]))
def test_order_of_samples_and_length_of_local_features_do_not_matter(order, power, backend):
    arguments = draw(4, 2, 5)
    changed = {name: arguments[name][list(order)] for name in ("features", "local_features", "labels")}
    changed["local_features"] = changed["local_features"] * 2.0**power
    with cge_kernels.backend(backend):
        results = cge_kernels.revised_cross_entropy(**arguments)
        reordered = cge_kernels.revised_cross_entropy(**arguments | changed)
    torch.testing.assert_close(reordered[0], results[0][list(order)], rtol=1e-6, atol=1e-6)
    assert all(a.equal(b[list(order)]) for a, b in zip(reordered[1:], results[1:], strict=True))


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that anything makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cge_kernels":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, prod(tensor.shape))
        return result


def test_without_scratch_no_tensor_has_a_number_for_each_sample_and_class(monkeypatch, backend):
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    monkeypatch.setattr(cpu, "CHUNK", 16)
    arguments = {name: value.cpu() for name, value in draw(40, 2, 300, 3).items()}
    with cge_kernels.launching(lambda launch: None), LargestResult() as made:
        differentiated(arguments)
    assert made.elements < 40 * 300
    # 16 classes of 40 samples (48 in a row), logits and scores; the statistics of 64 classes are fewer
    assert made.elements <= 3 * 16 * 48


def test_launches_once_forward_and_once_backward_while_logits_are_kept():
    kernels = []
    arguments = draw()
    arguments["local_features"].requires_grad_()
    small = replace(current_target(arguments["memory"]), multiprocessors=1)  # a larger GPU would split so little
    hook = cge_kernels.launching(lambda launch: (kernels.append(launch.kernel.fn.__name__), launch.run()), small)
    with cge_kernels.backend("triton"), hook:
        loss = cge_kernels.revised_cross_entropy(**arguments)[0]
        assert kernels == ["cast_and_norm_kernel", "cross_entropy_kernel", "reduce_tiles_kernel"]
        loss.sum().backward()
    assert kernels[3:] == ["grad_logits_kernel", "normalize_backward_kernel"]


def test_a_write_before_the_backward_is_an_error(backend):
    arguments = draw()
    arguments["features"].requires_grad_()
    loss = cge_kernels.revised_cross_entropy(**arguments)[0]
    arguments["memory"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.usefixtures("scratch")
def test_stripe_correct_is_the_losss_own_also_under_autocast():
    arguments = draw(64, 3, 500, 16)
    local_features, memory = (arguments[name].cpu() for name in ("local_features", "memory"))
    labels = torch.einsum("bic,ikc->bik", local_features, memory)[:, 1].argmax(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        flags = cge_kernels.stripe_correct(local_features, memory, labels)
    assert flags[:, 1].all()
    with cge_kernels.backend("cpu"):
        own = cge_kernels.revised_cross_entropy(
            arguments["features"].cpu(), arguments["weight"].cpu(), local_features, memory, labels
        )[2]
    assert flags.equal(own)


@pytest.mark.skipif(not GPU, reason="on the CPU a label out of range is an error")
def test_a_label_out_of_range_is_not_a_number_on_a_gpu():
    arguments = draw()
    arguments["labels"][1] = 19
    arguments["weight"].requires_grad_()
    loss, correct, stripe_correct = cge_kernels.revised_cross_entropy(**arguments)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False, False, False]
    assert not correct[1]
    assert not stripe_correct[1].any()
    assert arguments["weight"].grad.isfinite().all()

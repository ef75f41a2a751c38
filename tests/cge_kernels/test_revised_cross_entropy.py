"""The streamed loss against cge_reference in float64, on Triton's kernels and on ATen."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import GPU, KERNEL_DEVICE, ROUNDING, assert_within
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import cge_kernels
import cge_kernels.cross_entropy.cpu as streamed
import cge_reference
from cge_kernels import stripe_correct
from cge_kernels.cross_entropy.cpu import loss_of_statistics
from cge_kernels.cross_entropy.sharded import revised_statistics_op

BACKENDS = ["triton", "cpu"]
FLOAT32 = ROUNDING[torch.float32]
SMOOTHING = 0.1


def example(batch=5, classes=19, channels=6, stripes=3, feature_channels=None, seed=0):
    """Features, classifier, local features, memory (class 0 was never seen) and labels, float32."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(KERNEL_DEVICE)

    memory = normalize(draw(stripes, classes, channels), dim=2)
    memory[:, 0] = 0
    labels = torch.randint(classes, (batch,), generator=random).to(KERNEL_DEVICE)
    width = feature_channels or channels
    return draw(batch, width), draw(classes, width), draw(batch, stripes, channels), memory, labels


def check_parity(
    features, weight, local_features, memory, labels, bias=None, backend="triton", local_gradient=True, tied=False
):
    """Loss, hits and gradients, with an uneven upstream gradient, within bounds derived below.

    tied: leaves out the hits, where rounding decides.
    """
    leaves = (features, weight, local_features, bias)
    upstream = torch.linspace(0.5, 2, len(features), dtype=torch.float64, device=features.device)
    ours = [leaf if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    with cge_kernels.backend(backend):
        loss, hit, local_hit = cge_kernels.revised_cross_entropy(
            *ours[:3], memory, labels, SMOOTHING, local_gradient, ours[3]
        )
        loss.backward(upstream.float())
    exact = [leaf if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    truth, true_hit, true_local_hit = cge_reference.revised_cross_entropy(
        *exact[:3], memory.double(), labels, SMOOTHING, local_gradient, exact[3]
    )
    truth.backward(upstream)
    if not tied:
        assert hit.tolist() == true_hit.tolist()
        assert local_hit.tolist() == true_local_hit.tolist()

    with torch.no_grad():
        f, w, local, b = exact
        m, stripes, classes = memory.double(), len(memory), len(weight)
        rounding = ROUNDING[memory.dtype] if memory.dtype != torch.float32 else 0.0
        length = local.norm(dim=2, keepdim=True)
        unit = local / length
        scores = torch.einsum("bic,ikc->ibk", unit, m)
        weights = scores.sigmoid().log().mean(dim=0).exp()
        logits = f @ w.T + (0 if b is None else b)
        revised = logits * weights
        # A score is a sum of C products whose sizes add up to 1 at most; log w is no farther off than the scores. Both
        # operands of the classifier are rounded to the memory's dtype.
        score_error = rounding + (local.shape[2] + 8) * FLOAT32
        sizes = f.abs() @ w.abs().T + (0 if b is None else b.abs())
        revised_error = (2.1 * rounding + (f.shape[1] + 8) * FLOAT32) * sizes * weights + score_error * revised.abs()
        worst = revised_error.amax(dim=1)
        log_sum = revised.logsumexp(dim=1)
        sums_error = (classes + 8) * FLOAT32
        mean_size = revised.abs().mean(dim=1)
        own = revised.gather(1, labels[:, None].long())[:, 0].abs()
        # the largest of the exponents' errors, once in log_sum and once in the target
        loss_error = 2 * worst + sums_error * (1 + mean_size) + 8 * FLOAT32 * (log_sum.abs() + own)
        assert loss.dtype == torch.float32
        assert_within(loss, truth, loss_error.cpu())

        softmax = (revised - log_sum[:, None]).exp()
        target = torch.full_like(softmax, SMOOTHING / classes)
        target.scatter_add_(1, labels[:, None].long(), torch.full_like(own, 1 - SMOOTHING)[:, None])
        grad_revised = upstream[:, None] * (softmax - target)
        exponent_error = 2 * worst[:, None] + sums_error + 8 * FLOAT32 * (1 + log_sum.abs()[:, None])
        assert exponent_error.max() < 0.5  # so that exp(error) - 1 < 2 * error
        grad_error = upstream[:, None] * (2 * exponent_error * softmax + 4 * FLOAT32 * (softmax + target))
        grad_logits = grad_revised.abs() * weights
        logits_error = grad_error * weights + (score_error + 4 * FLOAT32 + rounding) * grad_logits
        batch = len(f)

        def within(index, error):
            stored = ROUNDING[leaves[index].dtype] * exact[index].grad.abs()
            assert ours[index].grad.dtype == leaves[index].dtype
            assert_within(ours[index].grad, exact[index].grad, (error + stored).cpu() + 1e-30)

        summed = logits_error + (rounding + (batch + 2) * FLOAT32) * grad_logits
        within(1, summed.T @ f.abs())
        within(0, (logits_error + (rounding + (classes + 2) * FLOAT32) * grad_logits) @ w.abs())
        if b is not None:
            within(3, summed.sum(dim=0))
        if not local_gradient:
            assert ours[2].grad is None
            return
        slope = (1 - scores.sigmoid()) / stripes
        grad_scores = (grad_revised * revised).abs() * slope
        scores_error = (grad_error * revised.abs() + grad_revised.abs() * revised_error) * slope
        scores_error = scores_error + (score_error + 2 * rounding + (classes + 8) * FLOAT32) * grad_scores
        unit_error = torch.einsum("ibk,ikc->bic", scores_error, m.abs())
        unit_size = torch.einsum("ibk,ikc->bic", grad_scores, m.abs()) * (local.shape[2] + 8) * FLOAT32
        both = unit_error + unit_size
        within(2, (both + unit.abs() * (unit.abs() * both).sum(dim=2, keepdim=True)) / length)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_hits_and_gradients_in_every_dtype(dtype, memory_dtype, backend):
    features, weight, local_features, memory, labels = example(17, 37, 21, feature_channels=33)
    arguments = (features.to(dtype) / 8, weight.to(dtype), local_features.to(dtype), memory.to(memory_dtype), labels)
    check_parity(*arguments, backend=backend, tied=memory_dtype != torch.float32)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), backend=st.sampled_from(BACKENDS))
def test_odd_sizes(data, backend):
    batch, classes, channels, stripes, width = (data.draw(st.integers(1, most)) for most in (5, 40, 70, 4, 70))
    check_parity(*example(batch, max(2, classes), channels, stripes, width), backend=backend)


@pytest.mark.parametrize(
    ("classes", "backend"), [(2, "triton"), (3, "triton"), (257, "triton"), (2, "cpu"), (1041, "cpu"), (4999, "cpu")]
)
def test_from_two_to_thousands_of_classes(classes, backend):
    check_parity(*example(3, classes, 4, 2), backend=backend)


def test_thousands_of_classes_in_the_widest_tiles():
    features, weight, local_features, memory, labels = example(3, 1999, 4, 2)
    check_parity(features, weight, local_features, memory.bfloat16(), labels, tied=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [15, 16, 17, 32, 33, 64, 65, 200])
def test_without_scratch_classes_go_by_16_and_labels_at_the_edges_are_found(monkeypatch, backend, classes):
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    features, weight, local_features, memory, _ = example(6, classes, 5, 2)
    labels = torch.tensor([0, 15, 16, 63, 64, classes - 1], device=KERNEL_DEVICE).clamp(max=classes - 1)
    check_parity(features, weight, local_features, memory, labels, backend=backend)


@pytest.mark.parametrize("chunk", [1, 7, 18, 19])
def test_chunks_of_any_size_on_aten(monkeypatch, chunk):
    monkeypatch.setattr(streamed, "CHUNK", chunk)
    features, weight, local_features, memory, _ = example(6)
    labels = torch.tensor([0, 6, 7, 13, 14, 18], device=KERNEL_DEVICE)
    check_parity(features, weight, local_features, memory, labels, backend="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scratch", ["256", "0"])
@pytest.mark.parametrize("local_gradient", [True, False])
def test_bias_and_detached_weights(monkeypatch, backend, scratch, local_gradient):
    monkeypatch.setenv("CGE_SCRATCH_MB", scratch)
    bias = torch.linspace(-1, 1, 19, device=KERNEL_DEVICE)
    check_parity(*example(), bias=bias, backend=backend, local_gradient=local_gradient)


def test_more_samples_classes_and_channels_than_one_tile():
    check_parity(*example(70, 150, 130, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    features, weight, local_features, memory, labels = example(5, 19, 7)
    strided = torch.stack([labels, labels], dim=1)[:, 1]
    arguments = features.T.contiguous().T, weight.T.contiguous().T, local_features.permute(2, 0, 1).contiguous()
    check_parity(*arguments[:2], arguments[2].permute(1, 2, 0), memory, strided, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand_do_not_overflow(backend, sign):
    features, weight, local_features, memory, labels = example()
    features = sign * 1e4 * normalize(features, dim=1)
    weight = normalize(weight, dim=1)
    leaves = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    with cge_kernels.backend(backend):
        loss, _, _ = cge_kernels.revised_cross_entropy(*leaves, local_features, memory, labels)
        loss.sum().backward()
    exact, _, _ = cge_reference.revised_cross_entropy(
        features.double(), weight.double(), local_features.double(), memory.double(), labels
    )
    assert exact.max() > 1e3
    assert_within(loss, exact, 1e4 * 40 * FLOAT32)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_class_never_seen_weighs_one_half(backend):
    features, weight, local_features, memory, labels = example()
    labels[:] = 0
    memory[:] = 0
    with cge_kernels.backend(backend):
        loss, _, local_hit = cge_kernels.revised_cross_entropy(features, weight, local_features, memory, labels, 0.0)
    expected = torch.nn.functional.cross_entropy(features @ weight.T / 2, labels, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert local_hit.all()  # every score is 0, and class 0 comes first


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_of_length_zero_have_finite_gradients(backend):
    features, weight, local_features, memory, labels = example()
    local_features[1] = 0
    local_features.requires_grad_()
    with cge_kernels.backend(backend):
        cge_kernels.revised_cross_entropy(features, weight, local_features, memory, labels)[0].sum().backward()
    assert local_features.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_stays_in_its_sample(backend):
    features, weight, local_features, memory, labels = example()
    features[2, 1] = torch.nan
    with cge_kernels.backend(backend):
        loss, _, _ = cge_kernels.revised_cross_entropy(features, weight, local_features, memory, labels)
    assert loss.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scratch", ["256", "0"])
def test_ties_go_to_the_lowest_index_across_tiles_and_chunks(monkeypatch, scratch, backend):
    monkeypatch.setenv("CGE_SCRATCH_MB", scratch)
    weight, memory = torch.ones(70, 2), torch.zeros(1, 70, 2)
    labels = torch.tensor([0, 1, 40])
    arguments = (torch.ones(3, 2), weight, torch.ones(3, 1, 2), memory, labels)
    with cge_kernels.backend(backend):
        _, hit, local_hit = cge_kernels.revised_cross_entropy(*(tensor.to(KERNEL_DEVICE) for tensor in arguments))
    assert hit.tolist() == [True, False, False]
    assert local_hit.tolist() == [[True], [False], [False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_from_run_to_run(backend):
    runs = []
    for _ in range(2):
        features, weight, local_features, memory, labels = example(17, 70, 33)
        leaves = [tensor.requires_grad_() for tensor in (features, weight, local_features)]
        with cge_kernels.backend(backend):
            loss, _, _ = cge_kernels.revised_cross_entropy(*leaves, memory, labels)
            loss.sum().backward()
        runs.append([loss, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("scratch", ["256", "0"])
def test_what_is_kept_gives_the_same_gradients_as_what_is_computed_again(monkeypatch, scratch):
    results = []
    for megabytes in ("256", scratch):
        monkeypatch.setenv("CGE_SCRATCH_MB", megabytes)
        features, weight, local_features, memory, labels = example(5, 40)
        leaves = [tensor.requires_grad_() for tensor in (features, weight, local_features)]
        with cge_kernels.backend("triton"):
            cge_kernels.revised_cross_entropy(*leaves, memory, labels)[0].sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for kept, again in zip(*results, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_scratch_no_tensor_has_a_number_for_each_sample_and_class(monkeypatch, backend):
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    monkeypatch.setattr(streamed, "CHUNK", 16)
    features, weight, local_features, memory, labels = (tensor.cpu() for tensor in example(40, 300, 3, 2))
    leaves = [tensor.requires_grad_() for tensor in (features, weight, local_features)]

    def ignore(launch):
        pass

    with cge_kernels.backend(backend), cge_kernels.launching(ignore), LargestResult() as made:
        loss, _, _ = cge_kernels.revised_cross_entropy(*leaves, memory, labels)
        loss.sum().backward()
    assert made.elements < 40 * 300
    # 16 classes of 40 samples (48 in a row), logits and scores; the statistics of 64 classes are fewer
    assert made.elements <= 3 * 16 * 48


def test_launches_once_forward_and_once_backward_while_logits_are_kept():
    launches = []
    features, weight, local_features, memory, labels = example()
    with (
        cge_kernels.backend("triton"),
        cge_kernels.launching(lambda launch: (launches.append(launch.kernel.fn.__name__), launch.run())),
    ):
        loss, _, _ = cge_kernels.revised_cross_entropy(
            features, weight, local_features.requires_grad_(), memory, labels
        )
        assert launches == ["prepare_kernel", "cross_entropy_kernel", "combine_kernel"]
        loss.sum().backward()
    assert launches[3:] == ["grad_logits_kernel", "project_kernel"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_shares_of_the_classes_make_the_loss_of_all(backend):
    features, weight, local_features, memory, labels = example(6, 20, 5)
    labels = torch.tensor([0, 6, 7, 8, 19, 12], device=KERNEL_DEVICE)
    with cge_kernels.backend(backend):
        parts = []
        for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
            rows = memory[:, part].contiguous()
            arguments = features, weight[part], local_features, rows, labels, None, part.start
            parts.append(revised_statistics_op(*arguments)[:4])
        expected = cge_kernels.revised_cross_entropy(features, weight, local_features, memory, labels, SMOOTHING)
    highest, winner, sums, target = (torch.stack(values) for values in zip(*parts, strict=True))
    most = highest.amax(dim=0)
    first = torch.where(highest == most, winner, 20).amin(dim=0)
    exponentials = (sums[:, 0] * (highest[:, 0] - most[0]).exp()).sum(dim=0)
    sums = torch.stack([exponentials, sums[:, 1].sum(dim=0)])
    loss, _, hit, local_hit = loss_of_statistics(most, first, sums, target.sum(dim=0), labels, 20, SMOOTHING)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    assert hit.equal(expected[1])
    assert local_hit.equal(expected[2])


def test_no_gradient_reaches_the_memory_and_a_write_before_the_backward_is_an_error():
    features, weight, local_features, memory, labels = example()
    loss, _, _ = cge_kernels.revised_cross_entropy(features.requires_grad_(), weight, local_features, memory, labels)
    memory.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_hits_are_the_same_under_autocast_also_without_scratch(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    _, _, local_features, memory, _ = (tensor.cpu() for tensor in example(64, 500, 16))
    labels = torch.einsum("bic,ikc->bik", local_features, memory)[:, 0].argmax(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert stripe_correct(local_features, memory, labels)[:, 0].all()


@pytest.mark.parametrize("wrong", [-1, 19])
def test_a_label_out_of_range_is_an_error_on_the_cpu(wrong):
    features, weight, local_features, memory, labels = (tensor.cpu() for tensor in example())
    labels[1] = wrong
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 19\), got {wrong}"):
        cge_kernels.revised_cross_entropy(features, weight, local_features, memory, labels)


@pytest.mark.skipif(not GPU, reason="on the CPU a label out of range is an error")
def test_a_label_out_of_range_is_not_a_number_on_a_gpu():
    features, weight, local_features, memory, labels = example()
    labels[1] = 19
    weight.requires_grad_()
    loss, hit, local_hit = cge_kernels.revised_cross_entropy(features, weight, local_features, memory, labels)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False, False, False]
    assert not hit[1]
    assert not local_hit[1].any()
    assert weight.grad.isfinite().all()


def test_wrong_arguments_are_named():
    features, weight, local_features, memory, labels = example()
    loss = cge_kernels.revised_cross_entropy
    with pytest.raises(ValueError, match=r"weight must have shape \(19, 6\) to fit memory and features"):
        loss(features, weight[:4], local_features, memory, labels)
    with pytest.raises(ValueError, match=r"memory must have shape \(3, 19, 6\) to fit local_features"):
        loss(features, weight, local_features, memory[:2], labels)
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        loss(features, weight, local_features, memory, labels.float())
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 1.5"):
        loss(features, weight, local_features, memory, labels, 1.5)
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\)"):
        loss(features, weight, local_features, memory, labels[:3])
    with pytest.raises(ValueError, match=r"bias must have shape \(19,\) to fit weight, got \(4,\)"):
        loss(features, weight, local_features, memory, labels, bias=torch.zeros(4, device=KERNEL_DEVICE))
    with pytest.raises(ValueError, match="memory must be contiguous"):
        loss(features, weight, local_features, memory.transpose(1, 2).contiguous().transpose(1, 2), labels)

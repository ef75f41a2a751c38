"""The composed loss against cge_reference in float64."""

import pytest
import torch
from support import KERNEL_DEVICE, ROUNDING, assert_within
from torch.nn.functional import normalize

import cge_kernels
import cge_reference
from cge_kernels.revised_cross_entropy import local_hits

BACKENDS = ["triton", "aten"]


def example(batch=5, classes=19, channels=6, stripes=3, dtype=torch.float32):
    random = torch.Generator().manual_seed(batch)

    def draw(*shape):
        return torch.randn(*shape, generator=random).to(KERNEL_DEVICE, dtype)

    memory = normalize(draw(stripes, classes, channels), dim=2)
    labels = torch.randint(classes, (batch,), generator=random).to(KERNEL_DEVICE)
    return draw(batch, channels), draw(classes, channels), draw(batch, stripes, channels), memory, labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scratch", ["256", "0"])
@pytest.mark.parametrize("local_gradient", [True, False])
def test_loss_hits_and_gradients(monkeypatch, backend, scratch, local_gradient):
    monkeypatch.setenv("CGE_SCRATCH_MB", scratch)
    features, weight, local_features, memory, labels = example()
    bias = torch.linspace(-1, 1, 19, device=KERNEL_DEVICE)
    results = []
    for package, dtype in ((cge_kernels, torch.float32), (cge_reference, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (features, weight, local_features, bias)]
        with cge_kernels.backend(backend):
            loss, hit, local_hit = package.revised_cross_entropy(
                *inputs[:3], memory.to(dtype), labels, 0.1, local_gradient, inputs[3]
            )
            loss.backward(torch.linspace(0.5, 2, 5, device=KERNEL_DEVICE, dtype=dtype))
        results.append((loss, hit, local_hit, [t.grad for t in inputs]))
    (loss, hit, local_hit, grads), (true_loss, true_hit, true_local_hit, true_grads) = results
    relative = 100 * ROUNDING[torch.float32]  # sums of at most 19 + 6 numbers, a handful of functions
    assert_within(loss, true_loss, relative * true_loss.detach().cpu())
    assert torch.equal(hit, true_hit)
    assert torch.equal(local_hit, true_local_hit)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        if true_grad is None:
            assert grad is None
        else:
            assert_within(grad, true_grad, relative * true_grad.abs().max().item())


@pytest.mark.parametrize("scratch", ["256", "0"])
def test_ties_go_to_the_lowest_index(monkeypatch, scratch):
    monkeypatch.setenv("CGE_SCRATCH_MB", scratch)
    weight, memory = torch.ones(3, 2), torch.zeros(1, 3, 2)
    arguments = (torch.ones(2, 2), weight, torch.ones(2, 1, 2), memory, torch.tensor([0, 1]))
    _, hit, local_hit = cge_kernels.revised_cross_entropy(*arguments)
    assert hit.tolist() == [True, False]
    assert local_hit.tolist() == [[True], [False]]


def test_hits_are_the_same_under_autocast_also_without_kept_scores(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "0")
    _, _, local_features, memory, _ = (tensor.cpu() for tensor in example(64, 500, 16))
    labels = torch.einsum("bic,ikc->bik", local_features, memory)[:, 0].argmax(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert local_hits(local_features, memory, labels)[:, 0].all()


@pytest.mark.parametrize("wrong", [-1, 19])
def test_a_label_out_of_range_is_an_error_on_the_cpu(wrong):
    features, weight, local_features, memory, labels = (tensor.cpu() for tensor in example())
    labels[1] = wrong
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 19\), got {wrong}"):
        cge_kernels.revised_cross_entropy(features, weight, local_features, memory, labels)


def test_a_bfloat16_memory_rounds_the_operands_and_nothing_else():
    features, weight, local_features, memory, labels = (tensor.cpu() for tensor in example())
    shadow = memory.bfloat16()
    loss, _, _ = cge_kernels.revised_cross_entropy(features, weight, local_features, shadow, labels)
    expected, _, _ = cge_reference.revised_cross_entropy(features, weight, local_features, shadow, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named():
    features, weight, local_features, memory, labels = example()
    loss = cge_kernels.revised_cross_entropy
    with pytest.raises(ValueError, match=r"weight must have shape \(19, 6\) to fit memory and features"):
        loss(features, weight[:4], local_features, memory, labels)
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

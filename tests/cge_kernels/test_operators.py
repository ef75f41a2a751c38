"""What every operator must be for PyTorch: opaque, traceable, deterministic in dtype, differentiable once."""

import pytest
import torch
from support import KERNEL_DEVICE
from torch.nn.functional import normalize

import cge_kernels
from cge_kernels.common.checks import valid_labels
from cge_kernels.cross_entropy.backward import product_, revised_cross_entropy_backward_op
from cge_kernels.cross_entropy.op import revised_cross_entropy_op
from cge_kernels.cross_entropy.sharded import revised_statistics_op
from cge_kernels.revise_logits.backward import revise_logits_backward_op
from cge_kernels.revise_logits.one_pass import one_pass_op
from cge_kernels.revise_logits.op import revise_logits_op
from cge_kernels.stripe_pool.op import stripe_pool_backward_op, stripe_pool_op
from cge_kernels.write_memory.op import write_memory_op

BACKENDS = ["triton", "cpu"]


def learnt(tensor):
    """A leaf that wants a gradient."""
    return tensor.clone().requires_grad_()


def example(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    feature_map = torch.rand(3, 4, 5, 2, generator=random).to(dtype)
    memory = normalize(torch.randn(2, 7, 4, generator=random), dim=2)
    logits = torch.randn(3, 7, generator=random)
    return tuple(tensor.to(KERNEL_DEVICE) for tensor in (feature_map, memory, logits, torch.tensor([1, 6, 1])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    feature_map, memory, logits, labels = example()
    p = torch.tensor(3.0, device=KERNEL_DEVICE)
    local_features = torch.rand(3, 2, 4, device=KERNEL_DEVICE)
    alpha = torch.tensor(0.5)
    with cge_kernels.backend(backend):
        calls = [
            (stripe_pool_op, (learnt(feature_map), 2, learnt(p), 1e-6)),
            (stripe_pool_op, (learnt(feature_map.to(memory_format=torch.channels_last)), 2, None, 1e-6)),
            (stripe_pool_backward_op, (torch.rand(3, 4), None, feature_map, torch.rand(3, 4), local_features, p, 1e-6)),
            (revise_logits_op, (learnt(logits), learnt(local_features), memory, True)),
            (revise_logits_op, (learnt(logits.T.contiguous().T), local_features, memory.bfloat16(), False)),
            (one_pass_op, (learnt(feature_map), learnt(logits), memory, learnt(p), 1e-6, True)),
            (write_memory_op, (memory.clone(), local_features, labels, alpha, memory.bfloat16())),
            (write_memory_op, (memory.clone(), local_features, labels, alpha, None)),
            (valid_labels, (labels, 7)),
        ]
        _, scores, scale = revise_logits_op(logits, local_features, memory, True)
        saved = (logits, local_features, memory, scores, scale)
        calls += [(revise_logits_backward_op, (torch.rand(3, 7), *saved, flag)) for flag in (True, False)]
        features, weight = torch.rand(3, 4, device=KERNEL_DEVICE), memory[0].clone()
        for bias in (None, torch.rand(7, device=KERNEL_DEVICE)):
            learnt_bias = bias if bias is None else learnt(bias)
            leaves = learnt(features), learnt(weight), learnt(local_features), memory, labels, learnt_bias
            calls.append((revised_cross_entropy_op, (*leaves, 0.1, True)))
            arguments = features, weight, local_features, memory, labels, bias
            calls.append((revised_statistics_op, (*arguments, 0)))
            _, log_sum, _, _, kept, scale = revised_cross_entropy_op(*arguments, 0.1, True)
            saved = *arguments, kept, scale, 0.1, 0, 7
            calls += [
                (revised_cross_entropy_backward_op, (torch.rand(3), log_sum, *saved, flag)) for flag in (True, False)
            ]
        half = torch.rand(2, 3, 4).bfloat16(), torch.rand(2, 4, 5).bfloat16()
        calls += [(product_, (torch.zeros(2, 3, 5), *half, adds)) for adds in (True, False)]
        for operator, arguments in calls:
            torch.library.opcheck(
                operator,
                tuple(a.to(KERNEL_DEVICE) if isinstance(a, torch.Tensor) and a.dim() else a for a in arguments),
            )


def loss_of_all(feature_map, p, weight, memory, labels):
    """Every operator but the write, in one graph."""
    global_feature, local_features = cge_kernels.stripe_pool(feature_map, 2, p)
    loss, hit, local_hit = cge_kernels.revised_cross_entropy(global_feature, weight, local_features, memory, labels)
    revised = cge_kernels.revise_logits(global_feature @ weight.T, local_features, memory)
    one_pass, _ = cge_kernels.revise_logits_one_pass(feature_map, revised, memory, p)
    return loss.sum() + one_pass.square().sum(), hit, local_hit


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_traces_everything_in_one_graph_and_changes_nothing(backend):
    feature_map, memory, _, labels = example()
    results = []
    for function in (loss_of_all, torch.compile(loss_of_all, fullgraph=True, backend="aot_eager")):
        x, weight = feature_map.clone().requires_grad_(), memory[0].clone().requires_grad_()
        p = torch.tensor(3.0, device=KERNEL_DEVICE, requires_grad=True)
        with cge_kernels.backend(backend):
            loss, hit, local_hit = function(x, p, weight, memory, labels)
            loss.backward()
        results.append([loss, hit, local_hit, x.grad, weight.grad, p.grad])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_traces_the_write(backend):
    _, memory, _, labels = example()
    local_features = torch.rand(3, 2, 4, device=KERNEL_DEVICE)
    eager, compiled = memory.clone(), memory.clone()
    write = torch.compile(cge_kernels.write_memory_, fullgraph=True, backend="aot_eager")
    with cge_kernels.backend(backend):
        cge_kernels.write_memory_(eager, local_features, labels, 0.5)
        write(compiled, local_features, labels, 0.5)
    assert not torch.equal(eager, memory)
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    feature_map, memory, logits, labels = example()

    def results():
        global_feature, local_features = cge_kernels.stripe_pool(feature_map, 2, 3.0)
        revised = cge_kernels.revise_logits(logits, local_features, memory)
        one_pass, _ = cge_kernels.revise_logits_one_pass(feature_map, logits, memory)
        loss, _, _ = cge_kernels.revised_cross_entropy(global_feature, memory[0], local_features, memory, labels)
        return global_feature, local_features, revised, one_pass, loss

    with cge_kernels.backend(backend):
        outside = results()
        with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
            inside = results()
    for first, second in zip(outside, inside, strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_an_error(backend):
    feature_map, memory, logits, labels = example()
    feature_map.requires_grad_()
    with cge_kernels.backend(backend):
        _, local_features = cge_kernels.stripe_pool(feature_map, 2, 3.0)
        revised = cge_kernels.revise_logits(logits, local_features, memory)
        (grad,) = torch.autograd.grad(revised.square().sum(), feature_map, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.sum().backward()
        features = logits[:, :4].clone().requires_grad_()
        loss, _, _ = cge_kernels.revised_cross_entropy(features, memory[0], local_features.detach(), memory, labels)
        (grad,) = torch.autograd.grad(loss.sum(), features, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            grad.sum().backward()


def test_exponent_and_alpha_may_be_numbers_or_tensors():
    feature_map, memory, _, labels = example()
    as_number = cge_kernels.stripe_pool(feature_map, 2, 3)[1]
    assert torch.equal(cge_kernels.stripe_pool(feature_map, 2, torch.tensor(3.0, dtype=torch.float64))[1], as_number)
    first = cge_kernels.write_memory_(memory.clone(), as_number, labels, 0.25)
    assert torch.equal(cge_kernels.write_memory_(memory.clone(), as_number, labels, torch.tensor(0.25)), first)

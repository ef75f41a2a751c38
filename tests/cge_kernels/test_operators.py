"""What every operator must be for PyTorch: opaque, traceable, deterministic in dtype, differentiable once."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import KERNEL_DEVICE, draw_sample
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import cge_kernels


def learnt(tensor):
    """A leaf that wants a gradient."""
    return tensor.clone().requires_grad_()


def draw():
    """A sample with a positive map, and an exponent."""
    sample = draw_sample()
    return sample._replace(feature_map=sample.feature_map.sigmoid()), torch.tensor(3.0, device=KERNEL_DEVICE)


class OperatorCalls(TorchDispatchMode):
    """Every call of an operator of the package, below autograd: operators and copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "cge_kernels":
            return func(*args, **(kwargs or {}))
        self.calls.append((func, tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), args)))
        with self:
            return func.redispatch(torch._C.DispatchKeySet(key_of_device()), *args, **(kwargs or {}))


def key_of_device():
    """The dispatch key of the operators' implementations."""
    return getattr(torch._C.DispatchKey, KERNEL_DEVICE.upper())


def run_everything():
    """Every operator forward and backward, with and without what may be None."""
    sample, p = draw()
    memory, labels = sample.memory, sample.labels
    bias = torch.rand(7, device=KERNEL_DEVICE)
    results = [
        *cge_kernels.stripe_pool(learnt(sample.feature_map), 2, learnt(p)),
        *cge_kernels.stripe_pool(learnt(sample.feature_map.to(memory_format=torch.channels_last)), 2),
        cge_kernels.stripe_pool(learnt(sample.feature_map), 2, p)[1],
        cge_kernels.revise_logits(learnt(sample.logits), learnt(sample.local_features), memory),
        cge_kernels.revise_logits(learnt(sample.logits.T.contiguous().T), sample.local_features, memory.bfloat16()),
        *cge_kernels.revise_logits_one_pass(learnt(sample.feature_map), learnt(sample.logits), memory, learnt(p)),
    ]
    leaves = [learnt(tensor) for tensor in (sample.features, sample.weight, sample.local_features)]
    results.append(cge_kernels.revised_cross_entropy(*leaves, memory, labels, bias=learnt(bias))[0])
    results.append(cge_kernels.revised_cross_entropy(*leaves[:2], sample.local_features, memory.half(), labels)[0])
    torch.autograd.backward(results, [torch.rand_like(result) for result in results])
    for low_precision_memory in (None, memory.bfloat16()):
        cge_kernels.write_memory_(memory.clone(), sample.local_features, labels, 0.5, low_precision_memory)
    shard = cge_kernels.ClassShard(0, 7, 9)  # the other classes' rank takes no part
    cge_kernels.revised_cross_entropy(*leaves, memory, labels, shard=shard)[0].sum().backward()


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_opcheck_of_every_operator(backend):
    with OperatorCalls() as seen, mock.patch("torch.jit.is_tracing", return_value=True):  # eager calls take none
        run_everything()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cge_kernels::")}
    uncalled = registered - {func.name() for func, _ in seen.calls}
    assert uncalled <= ({"cge_kernels::product_"} if backend == "cpu" else set())
    for func, arguments in seen.calls:
        torch.library.opcheck(func, arguments)


@pytest.mark.slow
def test_opcheck_of_gradients(backend):
    sample, p = draw()
    leaves = [learnt(tensor) for tensor in (sample.features, sample.weight, sample.local_features)]
    feature_map, logits = learnt(sample.feature_map), learnt(sample.logits)
    calls = {
        "stripe_pool": (feature_map, 2, learnt(p), 1e-6),
        "revise_logits": (logits, learnt(sample.local_features), sample.memory, True),
        "revise_logits_one_pass": (
            learnt(sample.feature_map),
            learnt(sample.logits),
            sample.memory,
            learnt(p),
            1e-6,
            True,
        ),
        "revised_cross_entropy": (*leaves, sample.memory, sample.labels, learnt(sample.weight[:, 0]), 0.1, True),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.cge_kernels, name).default, arguments)


def loss_of_all(feature_map, p, weight, memory, labels):
    """Every operator but the write, in one graph."""
    global_feature, local_features = cge_kernels.stripe_pool(feature_map, 2, p)
    loss, correct, stripe_correct = cge_kernels.revised_cross_entropy(
        global_feature, weight, local_features, memory, labels
    )
    revised = cge_kernels.revise_logits(global_feature @ weight.T, local_features, memory)
    one_pass, _ = cge_kernels.revise_logits_one_pass(feature_map, revised, memory, p)
    return loss.sum() + one_pass.square().sum(), correct, stripe_correct


@pytest.mark.slow
def test_torch_compile_traces_everything_in_one_graph_and_changes_nothing(backend):
    sample, p = draw()
    results = []
    for function in (loss_of_all, torch.compile(loss_of_all, fullgraph=True, backend="aot_eager")):
        x, weight, exponent = learnt(sample.feature_map), learnt(sample.weight), learnt(p)
        loss, correct, stripe_correct = function(x, exponent, weight, sample.memory, sample.labels)
        loss.backward()
        results.append([loss, correct, stripe_correct, x.grad, weight.grad, exponent.grad])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_torch_compile_traces_the_write(backend):
    sample, _ = draw()
    eager, compiled = sample.memory.clone(), sample.memory.clone()
    write = torch.compile(cge_kernels.write_memory_, fullgraph=True, backend="aot_eager")
    cge_kernels.write_memory_(eager, sample.local_features, sample.labels, 0.5)
    write(compiled, sample.local_features, sample.labels, 0.5)
    assert not torch.equal(eager, sample.memory)
    assert torch.equal(compiled, eager)


def test_autocast_changes_nothing(any_backend):
    sample, _ = draw()
    memory = sample.memory

    def results():
        global_feature, local_features = cge_kernels.stripe_pool(sample.feature_map, 2, 3.0)
        revised = cge_kernels.revise_logits(sample.logits, local_features, memory)
        one_pass, _ = cge_kernels.revise_logits_one_pass(sample.feature_map, sample.logits, memory)
        loss, *_ = cge_kernels.revised_cross_entropy(
            global_feature, sample.weight, local_features, memory, sample.labels
        )
        return global_feature, local_features, revised, one_pass, loss

    outside = results()
    with torch.autocast(KERNEL_DEVICE, torch.bfloat16):
        inside = results()
    for first, second in zip(outside, inside, strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


def test_a_second_derivative_is_an_error(backend):
    sample, _ = draw()
    feature_map, features = learnt(sample.feature_map), learnt(sample.features)
    _, local_features = cge_kernels.stripe_pool(feature_map, 2, 3.0)
    revised = cge_kernels.revise_logits(sample.logits, local_features, sample.memory)
    (grad,) = torch.autograd.grad(revised.square().sum(), feature_map, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    loss, *_ = cge_kernels.revised_cross_entropy(
        features, sample.weight, sample.local_features, sample.memory, sample.labels
    )
    (grad,) = torch.autograd.grad(loss.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_no_gradient_reaches_the_memory(any_backend):
    sample, _ = draw()
    memory = learnt(sample.memory)
    revised = cge_kernels.revise_logits(learnt(sample.logits), sample.local_features, memory)
    loss, *_ = cge_kernels.revised_cross_entropy(
        learnt(sample.features), sample.weight, sample.local_features, memory, sample.labels
    )
    (revised.sum() + loss.sum()).backward()
    assert memory.grad is None


def test_exponent_and_momentum_may_be_numbers_or_tensors(any_backend):
    sample, _ = draw()
    as_number = cge_kernels.stripe_pool(sample.feature_map, 2, 3)[1]
    p = torch.tensor(3.0, dtype=torch.float64, device=KERNEL_DEVICE)
    as_tensor = cge_kernels.stripe_pool(sample.feature_map, 2, p)[1]
    assert torch.equal(as_tensor, as_number)
    memory, labels = sample.memory, sample.labels
    first = cge_kernels.write_memory_(memory.clone(), as_number, labels, 0.25)
    assert torch.equal(cge_kernels.write_memory_(memory.clone(), as_number, labels, torch.tensor(0.25)), first)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_labels_of_any_integer_dtype_mean_the_same(dtype, any_backend):
    sample = draw_sample(4, 2, 300, 6)  # more classes than 8 bits can count
    labels = torch.tensor([1, 100, 5, 7], device=KERNEL_DEVICE)
    tensors = sample.features, sample.weight, sample.local_features, sample.memory
    of_int64 = cge_kernels.revised_cross_entropy(*tensors, labels)
    of_dtype = cge_kernels.revised_cross_entropy(*tensors, labels.to(dtype))
    assert all(a.equal(b) for a, b in zip(of_dtype, of_int64, strict=True))
    correct = cge_kernels.stripe_correct(sample.local_features, sample.memory, labels.to(dtype))
    assert correct.equal(cge_kernels.stripe_correct(sample.local_features, sample.memory, labels))
    written = [sample.memory.clone() for _ in range(2)]
    for memory, given in zip(written, (labels, labels.to(dtype)), strict=True):
        cge_kernels.write_memory_(memory, sample.local_features, given, 0.5)
    assert written[0].equal(written[1])


def test_an_empty_batch_gives_empty_results_and_gradients_of_zero(any_backend):
    features, local = (torch.rand(0, *shape, device=KERNEL_DEVICE, requires_grad=True) for shape in ((6,), (2, 6)))
    weight, memory = (
        torch.rand(5, 6, device=KERNEL_DEVICE, requires_grad=True),
        torch.rand(2, 5, 6, device=KERNEL_DEVICE),
    )
    labels = torch.zeros(0, dtype=torch.int64, device=KERNEL_DEVICE)
    loss, correct, stripe_correct = cge_kernels.revised_cross_entropy(features, weight, local, memory, labels)
    loss.sum().backward()
    assert (loss.shape, correct.shape, stripe_correct.shape) == ((0,), (0,), (0, 2))
    assert weight.grad.count_nonzero() == 0
    assert cge_kernels.revise_logits(torch.rand(0, 5, device=KERNEL_DEVICE), local, memory).shape == (0, 5)
    assert cge_kernels.stripe_correct(local, memory, labels).shape == (0, 2)
    assert cge_kernels.stripe_pool(torch.rand(0, 3, 4, 2, device=KERNEL_DEVICE), 2)[1].shape == (0, 2, 3)
    before = memory.clone()
    assert cge_kernels.write_memory_(memory, local, labels, 0.5).equal(before)

"""CGELoss with a low-precision copy of its memory: the copy follows, the float32 memory stays what it would be."""

import copy

import pytest
import torch
from error_budget import budget

import cge_kernels
from cge_fast import CGEHead, CGELoss, Embeddings
from cge_fast.losses.cge import FORGOTTEN_AFTER
from cge_fast.losses.criterion import ReidCriterion
from cge_fast.losses.metric import MetricLoss

CHANNELS, CLASSES, STRIPES = 8, 6, 3
LABELS = torch.arange(8) % 5  # class 5 is never seen


def trained(dtype: torch.dtype | None, steps: int = 20, seed: int = 0, watch=lambda *arguments: None) -> CGEHead:
    """A head trained on noisy patterns; watch(head, feature map, output) sees each step before its backward."""
    torch.manual_seed(seed)
    patterns = torch.rand(CLASSES, CHANNELS, 6, 2)
    head = CGEHead(CHANNELS, CLASSES, STRIPES, memory_dtype=dtype)
    torch.nn.init.normal_(head.loss.weight)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2)
    for step in range(1, steps + 1):
        feature_map = patterns[LABELS] + 0.3 * torch.rand(8, CHANNELS, 6, 2)
        out = head(feature_map, LABELS)
        watch(head, feature_map, out)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        head.write_memory(out.stripes, LABELS, step / steps)
    return head


def assert_copied(
    loss: CGELoss, dtype: torch.dtype = torch.bfloat16, memory_dtype: torch.dtype = torch.float32
) -> None:
    assert (loss.memory.dtype, loss.memory_read.dtype) == (memory_dtype, dtype)
    assert torch.equal(loss.memory_read, loss.memory.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_step_is_within_the_budget_of_its_dtype_and_reads_the_copy(dtype, backend):
    def watch(head, feature_map, out):
        arguments = {
            "features": out.embedding.detach(),
            "weight": head.loss.weight.detach(),
            "local_features": out.stripes,
            "memory": head.loss.memory_read.clone(),
            "labels": LABELS,
        }
        allowed = budget("revised_cross_entropy", arguments)
        leaves = {name: arguments[name].requires_grad_() for name in ("features", "weight", "local_features")}
        losses, correct, stripe_correct = cge_kernels.revised_cross_entropy(**arguments)
        losses.backward(allowed.upstream["loss"])
        allowed.check("loss", losses.detach())
        for name, leaf in leaves.items():
            allowed.check(f"grad_{name}", leaf.grad)
        assert torch.equal(out.loss, losses.mean())
        assert torch.equal(out.correct, correct)
        assert torch.equal(out.stripe_correct, stripe_correct)
        head.loss.eval()
        embeddings = Embeddings(out.pooled, out.stripes, out.embedding)
        revised = cge_kernels.revise_logits(out.embedding @ head.loss.weight.T, out.stripes, arguments["memory"])
        torch.testing.assert_close(head.loss.revised_logits(embeddings), revised)
        head.loss.train()
        seen.append(out.loss.item())

    seen = []
    with cge_kernels.backend(backend):
        head = trained(dtype, steps=5, watch=watch)
        without = trained(None, steps=5)
    assert_copied(head.loss, dtype)
    assert len(seen) == 5
    assert not torch.equal(head.loss.weight, without.loss.weight), "it reads a rounded memory"


def test_a_training_with_a_copy_ends_nearer_to_one_without_than_another_seed_does():
    results = {(dtype, seed): [] for dtype in (None, torch.bfloat16) for seed in range(3)}
    for (dtype, seed), losses in results.items():
        trained(dtype, seed=seed, watch=lambda head, feature_map, out, losses=losses: losses.append(out.loss.item()))
    last = {key: sum(losses[-5:]) / 5 for key, losses in results.items()}
    ordinary = [last[None, seed] for seed in range(3)]
    spread = max(ordinary) - min(ordinary)
    assert all(last[None, seed] < 0.5 * results[None, seed][0] for seed in range(3)), "it learns"
    assert all(abs(last[torch.bfloat16, seed] - last[None, seed]) < spread / 2 for seed in range(3))


def test_the_copy_is_not_saved_and_follows_what_is_loaded_and_cast():
    head, older = trained(torch.bfloat16, steps=2), trained(None, steps=3)
    assert head.state_dict().keys() == older.state_dict().keys()
    head.load_state_dict(older.state_dict())
    assert torch.equal(head.loss.memory, older.loss.memory)
    assert_copied(head.loss)
    ReidCriterion(head.loss, MetricLoss(), None, (1, 1, 0)).load_state_dict(
        {f"classification.{name}": 2 * tensor for name, tensor in older.loss.state_dict().items()}
    )
    assert torch.equal(head.loss.memory, 2 * older.loss.memory)
    assert_copied(copy.deepcopy(head.loss))
    assert_copied(head.half().loss)
    assert torch.equal(head.loss.memory, 2 * older.loss.memory)
    assert_copied(head.double().loss, memory_dtype=torch.float64)
    assert_copied(head.float().loss)
    assert head.to("meta").loss.memory_read.device.type == "meta"


def test_writing_before_the_backward_pass_is_caught_with_a_copy_too():
    def write(head, feature_map, out):
        head.write_memory(out.stripes, LABELS, 0.5)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(torch.bfloat16, steps=1, watch=write)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"memory_dtype must be torch.bfloat16, .* or None, got {dtype}"):
        CGEHead(CHANNELS, CLASSES, memory_dtype=dtype)


def test_a_loop_that_forgets_to_write_is_told_once(recwarn):
    loss, features = CGELoss(CHANNELS, CLASSES), torch.rand(8, CHANNELS)
    embeddings = Embeddings(features, torch.rand(8, STRIPES, CHANNELS), features)
    loss.eval()
    for _ in range(FORGOTTEN_AFTER):
        loss(embeddings, LABELS)
    loss.train()
    for step in range(2 * FORGOTTEN_AFTER):
        loss(embeddings, LABELS)
        if step == FORGOTTEN_AFTER // 2:
            loss.write_memory(embeddings.stripes, LABELS, 0.5)
    assert [str(warning.message) for warning in recwarn if "write_memory" in str(warning.message)] == [
        "CGELoss: 100 training steps without write_memory, which belongs after each optimizer.step(); the memory stays "
        "as it is"
    ]

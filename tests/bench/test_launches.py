"""Launches are counted by name, and views and allocations are not among them."""

from collections import Counter

import pytest
import torch

from bench.cases import EAGER, OURS, POOLINGS, Case
from bench.count import count_launches
from bench.count.operations import Operations
from bench.count.traffic import Problem
from bench.shapes import SHAPES
from cge_kernels.tools.gpus import HARDWARE

MOST_OWN = 8  # what a step of the head may launch of our own kernels
TINY = Problem(SHAPES["tiny"], "float32")
H100 = HARDWARE["sm_90"].target


def counted(function) -> Counter[str]:
    with Operations() as operations:
        function()
    return Counter(operation.name for operation in operations.found)


def test_what_counts_as_a_launch():
    x = torch.ones(3, 4)
    assert counted(lambda: x.T[1:].unsqueeze(0).expand(2, 3, 3).detach().view_as(torch.empty(2, 3, 3))) == {}
    assert counted(lambda: x.to(torch.float32).contiguous()) == {}
    assert counted(lambda: (x[:0] + 1, x.sum().item())) == {"aten.sum": 1}
    assert counted(lambda: (x.T.contiguous(), x.reshape(4, 3), x.add_(1))) == {"aten.clone": 1, "aten.add_": 1}


def test_bytes_of_operations():
    x, row = torch.ones(3, 4), torch.ones(4)
    with Operations() as operations:
        x + row.expand(3, 4)
        x[torch.tensor([0, 2])]
        x[torch.tensor([0])] = row[None]
        x.new_zeros(())
    # index tensors are int64; what is gathered or scattered is read once and written once
    moved = {operation.name: operation.moved for operation in operations.found}
    assert (moved["aten.add"], moved["aten.new_zeros"]) == (48 + 16 + 48, 4)
    assert (moved["aten.index"], moved["aten.index_put_"]) == (16 + 2 * 32, 8 + 2 * 16)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_step_launches_each_of_our_kernels_once(pooling):
    (own, beside), (no_kernel, eager) = (
        count_launches(Case("head", pooling), contender, TINY, H100) for contender in (OURS, EAGER)
    )
    assert own == dict.fromkeys(
        (
            *("stripe_pool_kernel", "stripe_pool_backward_kernel", "write_memory_kernel"),
            *("cast_and_norm_kernel", "products_kernel", "loss_kernel"),  # the first for a float32 memory alone
            *("grad_logits_kernel", "normalize_backward_kernel"),
        ),
        1,
    )
    assert own.total() <= MOST_OWN
    assert no_kernel.total() == 0
    assert eager["aten.mm"] == 3  # the classifier, forward, and its two gradients
    assert beside["aten.mm"] == 0
    assert beside["library matmul"] == 3  # the gradients of classifier, features and local features
    assert not any(name.startswith("cge_kernels") for name in beside | eager)
    assert own.total() + beside.total() < eager.total()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_pass_is_one_launch_forward(pooling):
    case = Case("revise_logits_one_pass", pooling)
    own, beside = count_launches(case, OURS, TINY, H100)
    kernels = ("one_pass_kernel", "grad_scores_kernel", "grad_local_kernel", "stripe_pool_backward_kernel")
    assert own == dict.fromkeys(kernels, 1)
    _, eager = count_launches(case, EAGER, TINY, H100)
    assert own.total() + beside.total() < eager.total()
    assert "aten.ones" not in beside | eager  # gradients that a backward starts from are no part of it

"""The learning rate and the memory's momentum over the epochs."""

import math

import pytest

from cge_fast.options import OptimConfig
from cge_fast.schedule import learning_rate, memory_momentum


def rates(optim, *epochs_done, steps_per_epoch=100):
    return [learning_rate(optim, done, steps_per_epoch) for done in epochs_done]


def test_the_papers_schedule():
    optim = OptimConfig(epochs=120, lr=3.5e-4, warmup=10, warmup_factor=0.1, milestones=[40, 90], gamma=0.1)
    found = rates(optim, 0, 5, 10, 39.99, 40, 89.99, 90, 119.99)
    assert found == pytest.approx([3.5e-5, 1.925e-4, 3.5e-4, 3.5e-4, 3.5e-5, 3.5e-5, 3.5e-6, 3.5e-6])


def test_bagtricks_goes_by_epochs_counted_from_one():
    optim = OptimConfig(epochs=120, lr=1.0, warmup=10, warmup_factor=0.01, by_epoch=True, milestones=[40, 70])
    published = {e: 0.01 * (1 - e / 10) + e / 10 for e in (1, 5, 9)} | {10: 1.0, 39: 1.0, 40: 0.1, 69: 0.1, 70: 0.01}
    for epoch, factor in published.items():
        assert rates(optim, epoch - 1, epoch - 0.01) == pytest.approx([factor, factor]), epoch


@pytest.mark.parametrize(("steps", "first"), [(200, 50), (202, 49), (199, 50)])
def test_fastreid_warms_up_by_steps_and_drops_at_whole_epochs_afterwards(steps, first):
    """Its scheduler steps at the end of each epoch from the one in which step 2000 is done."""
    optim = OptimConfig(
        epochs=120, lr=1.0, warmup_steps=2000, warmup_factor=0.1, milestones=[40, 90], milestones_after_warmup=True
    )
    found = rates(optim, 0, 1000 / steps, 2000 / steps, first - 1 / steps, first, steps_per_epoch=steps)
    assert found == pytest.approx([0.1, 0.55, 1, 1, 0.1])
    assert rates(optim, first + 50 - 1 / steps, first + 50, steps_per_epoch=steps) == pytest.approx([0.1, 0.01])


def test_numbers_below_one_are_shares_of_the_training():
    optim = OptimConfig(epochs=20, lr=1.0, warmup=0.1, warmup_factor=0.5, milestones=[0.6, 0.85], gamma=0.1)
    assert rates(optim, 0, 1, 2, 11.9, 12, 17) == pytest.approx([0.5, 0.75, 1, 1, 0.1, 0.01])


def test_no_warmup_and_no_milestones_is_a_constant():
    optim = OptimConfig(epochs=3, lr=1.0, warmup=0, milestones=[])
    assert rates(optim, 0, 2.9) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0]),
        ("exponential", [1.0, math.exp(-5 / 16), math.exp(-20 / 16), math.exp(-45 / 16)]),
        ("constant", [0.01] * 4),
    ],
)
def test_the_memorys_momentum(strategy, expected):
    assert [memory_momentum(strategy, epoch, 4) for epoch in (1, 2, 3, 4)] == pytest.approx(expected)
    if strategy != "constant":
        assert memory_momentum(strategy, 1, 1) == 1  # one epoch in all


@pytest.mark.parametrize("epoch", [0, 5])
def test_epochs_count_from_one(epoch):
    with pytest.raises(ValueError, match=f"epoch must lie between 1 and 4, got {epoch}"):
        memory_momentum("linear", epoch, 4)

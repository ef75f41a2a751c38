"""The learning rate and the memory's momentum over the epochs."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cge_fast.options import OptimConfig
from cge_fast.schedule import LOWEST, learning_rate, memory_momentum


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


curved = st.builds(
    OptimConfig,
    schedule=st.sampled_from(["cosine", "one_cycle"]),
    epochs=st.integers(1, 200),
    lr=st.floats(1e-6, 10),
    warmup=st.floats(0, 250),
    warmup_factor=st.floats(1e-3, 1),
    by_epoch=st.booleans(),
)


@given(curved, st.lists(st.floats(0, 1, exclude_max=True), min_size=2))
def test_a_cosines_rate_rises_in_the_warmup_falls_afterwards_and_stays_in_its_bounds(optim, shares):
    done = sorted(share * optim.epochs for share in shares)
    found = rates(optim, *done)
    assert all(
        min(optim.warmup_factor, LOWEST) * optim.lr <= rate * (1 + 1e-9) <= optim.lr * (1 + 2e-9) for rate in found
    )
    warmup = optim.warmup * optim.epochs if optim.warmup < 1 else optim.warmup
    number = [math.floor(epoch) + 1 if optim.by_epoch else epoch for epoch in done]
    for (first, second), (rate, later) in zip(pairwise(number), pairwise(found), strict=True):
        if second < warmup:
            assert later >= rate * (1 - 1e-9)
        if first >= warmup:
            assert later <= rate * (1 + 1e-9)


@given(curved.filter(lambda optim: not optim.by_epoch and optim.warmup < 0.9))
def test_a_cosine_starts_at_the_warmups_factor_reaches_the_rate_and_ends_at_its_lowest(optim):
    warmup = optim.warmup * optim.epochs
    middle = (warmup + optim.epochs) / 2
    factors = [LOWEST, (1 + LOWEST) / 2, 1.0]
    assert rates(optim, optim.epochs, middle, warmup) == pytest.approx([optim.lr * factor for factor in factors])
    if warmup > 1e-6:
        assert rates(optim, 0) == pytest.approx([optim.lr * optim.warmup_factor])
        halfway = (1 + optim.warmup_factor) / 2  # of a line and of half a cosine
        assert rates(optim, warmup / 2) == pytest.approx([optim.lr * halfway])


def test_only_one_cycles_warmup_is_level_at_its_ends():
    line, curve = (
        rates(OptimConfig(schedule=schedule, epochs=100, lr=1.0, warmup=40, warmup_factor=0.1), 10, 30)
        for schedule in ("cosine", "one_cycle")
    )
    assert line == pytest.approx([0.325, 0.775])
    assert curve[0] < line[0] < line[1] < curve[1]


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

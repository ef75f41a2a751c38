"""The learning rate over the epochs."""

import pytest

from cge_fast.config import OptimConfig
from cge_fast.schedule import learning_rate


def test_the_papers_schedule():
    optim = OptimConfig(epochs=120, lr=3.5e-4, warmup=10, warmup_factor=0.1, milestones=[40, 90], gamma=0.1)
    rates = {done: learning_rate(optim, done) for done in (0, 5, 10, 39.99, 40, 89.99, 90, 119.99)}
    assert rates == pytest.approx(
        {0: 3.5e-5, 5: 1.925e-4, 10: 3.5e-4, 39.99: 3.5e-4, 40: 3.5e-5, 89.99: 3.5e-5, 90: 3.5e-6, 119.99: 3.5e-6}
    )


def test_numbers_below_one_are_shares_of_the_training():
    optim = OptimConfig(epochs=20, lr=1.0, warmup=0.1, warmup_factor=0.5, milestones=[0.6, 0.85], gamma=0.1)
    assert [learning_rate(optim, done) for done in (0, 1, 2, 11.9, 12, 17)] == pytest.approx(
        [0.5, 0.75, 1, 1, 0.1, 0.01]
    )


def test_no_warmup_and_no_milestones_is_a_constant():
    optim = OptimConfig(epochs=3, lr=1.0, warmup=0, milestones=[])
    assert [learning_rate(optim, done) for done in (0, 2.9)] == [1.0, 1.0]

"""The learning rate as a function of how much of the training is done."""

import math

from cge_fast.options import OptimConfig


def learning_rate(optim: OptimConfig, epochs_done: float, steps_per_epoch: int) -> float:
    """Linear warm-up from warmup_factor * lr to lr, then a factor gamma at each milestone.

    Args:
        optim: the settings; a warm-up or milestone below 1 is a share of all epochs. With `by_epoch` the rate of every
            step is that of its epoch's number t, counted from 1.
        epochs_done: epochs done before this step, with its fraction; 0 at the first step.
        steps_per_epoch: turns `warmup_steps` into epochs.
    """

    def in_epochs(length: float) -> float:
        return length * optim.epochs if length < 1 else length

    warmup = optim.warmup_steps / steps_per_epoch if optim.warmup_steps else in_epochs(optim.warmup)
    done = math.floor(epochs_done) + 1 if optim.by_epoch else epochs_done
    after = warmup if optim.milestones_after_warmup else 0.0
    factor = optim.gamma ** sum(done >= after + in_epochs(milestone) for milestone in optim.milestones)
    if done < warmup:
        factor *= optim.warmup_factor + (1 - optim.warmup_factor) * done / warmup
    return optim.lr * factor

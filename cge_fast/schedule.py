"""The learning rate, and the memory's momentum, as functions of how much of the training is done."""

import math

from cge_fast.options import MemoryMomentum, OptimConfig

CONSTANT_MOMENTUM = 0.01
LOWEST = 0.002  # of the rate, at the end of a cosine; FastReID's 7.7e-7 after 3.5e-4


def learning_rate(optim: OptimConfig, epochs_done: float, steps_per_epoch: int) -> float:
    """Warm-up from warmup_factor * lr to lr, then a factor gamma at each milestone, or half a cosine to LOWEST * lr.

    Args:
        optim: the settings; a warm-up or milestone below 1 is a share of all epochs. With `by_epoch` the rate of every
            step is that of its epoch's number t, counted from 1.
        epochs_done: epochs done before this step, with its fraction; 0 at the first step.
        steps_per_epoch: turns `warmup_steps` into epochs. Milestones after the warm-up are counted from its last whole
            epoch: FastReID's scheduler steps at an epoch's end, for the first time in the epoch that ends the warm-up.
    """

    def in_epochs(length: float) -> float:
        return length * optim.epochs if length < 1 else length

    warmup = optim.warmup_steps / steps_per_epoch if optim.warmup_steps else in_epochs(optim.warmup)
    done = math.floor(epochs_done) + 1 if optim.by_epoch else epochs_done
    factor = 1.0
    if optim.schedule == "multistep":
        after = math.floor(warmup) if optim.milestones_after_warmup else 0.0
        factor = optim.gamma ** sum(done >= after + in_epochs(milestone) for milestone in optim.milestones)
    elif done >= warmup:
        factor = LOWEST + (1 - LOWEST) * half_cosine(1 - (done - warmup) / max(optim.epochs - warmup, 1e-9))
    if done < warmup:
        share = done / warmup if optim.schedule != "one_cycle" else half_cosine(done / warmup)
        factor *= optim.warmup_factor + (1 - optim.warmup_factor) * share
    return optim.lr * factor


def half_cosine(share: float) -> float:
    """From 0 to 1 as `share` does, level at both ends."""
    return (1 - math.cos(math.pi * share)) / 2


def memory_momentum(strategy: MemoryMomentum, epoch: int, epochs: int) -> float:
    """How much of an old memory row stays (the paper's alpha), for epoch t = 1..E.

    linear t/E; exponential exp(-5 * ((1-t)/E)^2), as the paper prints it; constant 0.01.

    Raises:
        ValueError: the epoch is outside 1..E.
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch must lie between 1 and {epochs}, got {epoch}")
    match strategy:
        case "linear":
            return epoch / epochs
        case "exponential":
            return math.exp(-5 * ((1 - epoch) / epochs) ** 2)
        case "constant":
            return CONSTANT_MOMENTUM

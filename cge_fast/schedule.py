"""The learning rate as a function of how much of the training is done."""

from cge_fast.config import OptimConfig


def learning_rate(optim: OptimConfig, epochs_done: float) -> float:
    """Linear warm-up from warmup_factor * lr to lr, then a factor gamma at each milestone.

    Args:
        optim: the settings; a warm-up or milestone below 1 is a share of all epochs.
        epochs_done: epochs done before this step, with its fraction; 0 at the first step.
    """

    def in_epochs(length: float) -> float:
        return length * optim.epochs if length < 1 else length

    warmup = in_epochs(optim.warmup)
    factor = optim.gamma ** sum(epochs_done >= in_epochs(milestone) for milestone in optim.milestones)
    if epochs_done < warmup:
        factor *= optim.warmup_factor + (1 - optim.warmup_factor) * epochs_done / warmup
    return optim.lr * factor

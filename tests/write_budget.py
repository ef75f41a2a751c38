"""How far a memory that write_memory_ wrote may be from the truth, by the rule of error_budget."""

import torch
from error_budget import ROUNDING, assert_within_budget

import cge_kernels
import cge_reference


def write_tolerance(unit, memory, local_features, labels, momentum):
    """Of each row, from float64 arguments.

    A mean of K instances has K roundings of the sum of their sizes, which cancelling instances magnify against the
    mean's length; a length of C numbers has C. The blend adds a few, and magnifies them if it is short.
    """
    _, classes, channels = memory.shape
    tolerance = torch.zeros_like(memory)
    for identity in range(classes):
        instances = local_features[labels == identity].transpose(0, 1)  # (n, K, C)
        count = instances.shape[1]
        mean = instances.mean(dim=1, keepdim=True)
        length = mean.norm(dim=2, keepdim=True)
        cancelled = instances.abs().mean(dim=1, keepdim=True).norm(dim=2, keepdim=True) / length
        error = (count + 4) * unit * cancelled + (channels + 8) * unit
        old = memory[:, identity : identity + 1]
        blend = momentum * old + (1 - momentum) * mean / length
        blend = torch.where((old == 0).all(dim=2, keepdim=True), mean / length, blend)
        tolerance[:, identity : identity + 1] = 2 * error / blend.norm(dim=2, keepdim=True) + (channels + 8) * unit
    return tolerance.nan_to_num(nan=0.0)  # of classes without instances


def check_write(memory, local_features, labels, momentum, backend, low_precision_memory=None):
    """Writes in place, within the budget of the reference in the same dtypes."""
    truth = cge_reference.write_memory_(memory.double(), local_features.double(), labels, momentum)
    reference = cge_reference.write_memory_(memory.clone(), local_features, labels, momentum)
    tolerance = write_tolerance(ROUNDING[memory.dtype], memory.double(), local_features.double(), labels, momentum)
    with cge_kernels.backend(backend):
        written = cge_kernels.write_memory_(memory, local_features, labels, momentum, low_precision_memory)
    assert written is memory
    doubled = 2 if memory.dtype == torch.float64 else 1  # the truth has such roundings too then
    assert_within_budget(memory, truth, reference, doubled * tolerance, "memory")

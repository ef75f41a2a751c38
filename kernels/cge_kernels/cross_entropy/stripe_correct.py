"""Which stripes classify a sample correctly, without a loss."""

import torch
from torch import Tensor

from cge_kernels.common import checks
from cge_kernels.common.budget import scratch_bytes


@torch.no_grad()
def stripe_correct(local_features: Tensor, memory: Tensor, labels: Tensor) -> Tensor:
    """Whether each stripe alone classifies a sample correctly: the arg max of its scores s_i is the label.

    The scores are computed in chunks of classes. Ties go to the lowest index.

    Args:
        local_features: (B, n, C), floating.
        memory: (n, N, C), floating, contiguous.
        labels: (B,), integer; for one outside [0, N) no stripe is correct.

    Returns:
        (B, n) bool.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ranks, shapes or devices do not fit, or the memory is not contiguous.
    """
    checks.check_local(local_features, memory)
    checks.require_tensor("labels", labels, "(B,)", "an integer")
    checks.require_shape("labels", labels, (len(local_features),), f"local_features {tuple(local_features.shape)}")
    checks.require_same_device(memory=memory, labels=labels)
    labels = checks.as_int64(labels)
    stripes, classes, _ = memory.shape
    batch = len(labels)
    dtype = checks.accumulation_dtype(local_features, memory)
    local = local_features.to(memory.dtype).to(dtype).transpose(0, 1)
    best = local.new_full((stripes, batch), -torch.inf)
    argmax = labels.new_zeros((stripes, batch), dtype=torch.int64)
    chunk = max(1, scratch_bytes() // (stripes * max(1, batch) * 4))
    for start in range(0, classes, chunk):
        rows = memory[:, start : start + chunk].to(dtype)
        with torch.autocast(rows.device.type, enabled=False):
            products = torch.bmm(local, rows.transpose(1, 2))
        row_max, where = products.max(dim=2)
        argmax = torch.where(row_max > best, where + start, argmax)
        best = torch.maximum(best, row_max)
    return labels.unsqueeze(1) == argmax.T

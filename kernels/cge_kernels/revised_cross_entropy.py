"""Cross entropy of the revised logits, straight from features and classifier.

Composed of a matmul, revise_logits and torch's cross entropy: the (B, N) logits exist.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cge_kernels import checks
from cge_kernels.checks import accumulation_dtype, require_same_device, require_shape, require_tensor
from cge_kernels.configurations import scratch_bytes
from cge_kernels.revise_logits import check_revision, revise_logits_op


@torch.library.custom_op("cge_kernels::valid_labels", mutates_args=())
def valid_labels(labels: Tensor, classes: int) -> Tensor:
    """checks.valid_labels, whose look at CPU labels torch.compile could not trace."""
    return checks.valid_labels(labels, classes)


@valid_labels.register_fake
def _(labels, classes):
    return torch.empty_like(labels, dtype=torch.bool)


@torch.no_grad()
def local_hits(local_features: Tensor, memory: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
    """(B, n) bool: whether the arg max of a stripe's scores is the label, ties to the lowest index.

    scores: (n, B, at least N); without them, or with (n, B, 0), they are computed in chunks of classes.
    """
    stripes, classes, _ = memory.shape
    if scores is not None and scores.shape[2]:
        return labels.unsqueeze(1) == scores[:, :, :classes].argmax(dim=2).T
    batch = len(labels)
    dtype = accumulation_dtype(local_features, memory)
    operand = local_features.to(memory.dtype).to(dtype).transpose(0, 1)
    best = operand.new_full((stripes, batch), -torch.inf)
    winner = labels.new_zeros((stripes, batch), dtype=torch.int64)
    chunk = max(1, scratch_bytes() // (stripes * batch * 4))
    for start in range(0, classes, chunk):
        rows = memory[:, start : start + chunk].to(dtype)
        with torch.autocast(rows.device.type, enabled=False):
            products = torch.bmm(operand, rows.transpose(1, 2))
        highest, where = products.max(dim=2)
        winner = torch.where(highest > best, where + start, winner)
        best = torch.maximum(best, highest)
    return labels.unsqueeze(1) == winner.T


def revised_cross_entropy(
    features: Tensor,
    weight: Tensor,
    local_features: Tensor,
    memory: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.1,
    local_gradient: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Label-smoothed cross entropy of (features @ weight.T + bias) * w, with w as in `revise_logits`.

    The target is (1 - e) * onehot + e / N (the paper's equation 5). The operands of both products are cast to the
    memory's dtype; sums and the loss are float32 (float64 if an argument is).

    Args:
        features: (B, C), floating: what the classifier sees, after BNNeck and times logit_scale.
        weight: (N, C), floating: the classifier's rows.
        local_features: (B, n, C'), floating.
        memory: (n, N, C'), floating, contiguous; only read, and no gradient reaches it.
        labels: (B,), integer, in [0, N).
        label_smoothing: e, in [0, 1].
        local_gradient: whether the gradient flows through w to the local features.
        bias: (N,), floating, or None.

    Returns:
        loss (B,); hit (B,) bool, whether the arg max of the revised logits is the label; local_hit (B, n) bool, the
        same of each stripe's scores s_i. Ties go to the lowest index.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ranks, shapes or devices do not fit, label_smoothing is outside [0, 1], or (on the CPU) a label is
            outside [0, N); on a GPU such a sample has a NaN loss and no hit.
    """
    require_tensor("features", features, "(B, C)")
    require_tensor("weight", weight, "(N, C)")
    require_tensor("labels", labels, "(B,)", "an integer")
    require_tensor("local_features", local_features, "(B, n, C)")
    require_tensor("memory", memory, "(n, N, C)")
    require_same_device(features=features, weight=weight, memory=memory, labels=labels)
    batch, classes = local_features.shape[0], memory.shape[1]
    fitting = f"local_features {tuple(local_features.shape)} and memory {tuple(memory.shape)}"
    require_shape("features", features, (batch, features.shape[1]), fitting)
    require_shape("weight", weight, (classes, features.shape[1]), f"memory and features {tuple(features.shape)}")
    require_shape("labels", labels, (batch,), fitting)
    if bias is not None:
        require_tensor("bias", bias, "(N,)")
        require_shape("bias", bias, (classes,), "weight")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")

    dtype = accumulation_dtype(features, weight, local_features, memory)
    with torch.autocast(features.device.type, enabled=False):
        logits = features.to(memory.dtype).to(dtype) @ weight.to(memory.dtype).to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        check_revision(logits, local_features, memory)
        valid = valid_labels(labels, classes)
        revised, scores, _ = revise_logits_op(logits, local_features, memory, local_gradient)
        targets = torch.where(valid, labels, 0).long()
        loss = cross_entropy(revised, targets, reduction="none", label_smoothing=label_smoothing)
        loss = torch.where(valid, loss, torch.nan)
        hit = revised.detach().argmax(dim=1) == labels
    return loss, hit, local_hits(local_features, memory, labels, scores.detach())

"""Cross entropy of the revised logits, straight from features and classifier."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cge_reference.checks import (
    accumulation_dtype,
    require_same_device,
    require_shape,
    require_tensor,
    valid_labels,
    without_autocast,
)
from cge_reference.revise_logits import local_scores, revise


@without_autocast
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
        memory: (n, N, C'), floating; only read, and no gradient reaches it.
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
    scores = local_scores(local_features, memory)
    require_same_device(features=features, weight=weight, memory=memory, labels=labels)
    batch, _, classes = scores.shape
    fitting = f"local_features {tuple(local_features.shape)} and memory {tuple(memory.shape)}"
    require_shape("features", features, (batch, features.shape[1]), fitting)
    require_shape("weight", weight, (classes, features.shape[1]), f"memory and features {tuple(features.shape)}")
    require_shape("labels", labels, (batch,), fitting)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")

    valid = valid_labels(labels, classes)
    dtype = accumulation_dtype(features, weight, scores)
    logits = features.to(memory.dtype).to(dtype) @ weight.to(memory.dtype).to(dtype).T
    if bias is not None:
        require_tensor("bias", bias, "(N,)")
        require_shape("bias", bias, (classes,), "weight")
        logits = logits + bias.to(dtype)
    revised = revise(logits, scores, local_gradient)
    targets = torch.where(valid, labels, 0).long()
    loss = cross_entropy(revised, targets, reduction="none", label_smoothing=label_smoothing)
    loss = torch.where(valid, loss, torch.nan)
    hit = revised.argmax(dim=1) == labels
    local_hit = scores.argmax(dim=2) == labels.unsqueeze(1)
    return loss, hit, local_hit

"""Cross entropy of the revised logits, straight from features and classifier."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cge_reference.common import accumulation_dtype, without_autocast
from cge_reference.revise_logits import local_scores, revise


@without_autocast
def revised_cross_entropy(
    features: Tensor, weight: Tensor, local_features: Tensor, memory: Tensor, labels: Tensor,
    label_smoothing: float = 0.1, local_gradient: bool = True, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Label-smoothed cross entropy of (features @ weight.T + bias) * w, with w as in `revise_logits`.

    The target is (1 - e) * onehot + e / N (the paper's equation 5). Features (B, C) and weight (N, C) are cast to the
    memory's dtype for the product; sums and the loss are float32 (float64 if an argument is).

    Returns loss (B,); correct (B,) bool, whether the arg max of the revised logits is the label; stripe_correct (B, n)
    bool, the same of each stripe's scores. Ties go to the lowest index. A label outside [0, N) has a NaN loss.
    """
    scores = local_scores(local_features, memory)
    dtype = accumulation_dtype(features, weight, scores)
    logits = features.to(memory.dtype).to(dtype) @ weight.to(memory.dtype).to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    revised = revise(logits, scores, local_gradient)
    valid = (labels >= 0) & (labels < len(weight))
    targets = torch.where(valid, labels, 0).long()
    loss = cross_entropy(revised, targets, reduction="none", label_smoothing=label_smoothing)
    correct = revised.argmax(dim=1) == labels
    stripe_correct = scores.argmax(dim=2) == labels.unsqueeze(1)
    return torch.where(valid, loss, torch.nan), correct, stripe_correct

"""write_memory_ on ATen."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

NORM_EPS = 1e-12  # a mean feature below this norm counts as zero: it has no direction


def write_memory_(memory: Tensor, local_features: Tensor, labels: Tensor, alpha: Tensor, shadow: Tensor | None) -> None:
    """Writes memory and shadow in place; samples whose label is out of range write nothing."""
    labels = labels.long()
    valid = (labels >= 0) & (labels < memory.shape[1])
    identities, instance_of = labels[valid].unique(return_inverse=True)
    features = local_features[valid].to(memory.dtype)
    sums = features.new_zeros(len(identities), *features.shape[1:]).index_add_(0, instance_of, features)
    counts = instance_of.bincount(minlength=len(identities)).to(features.dtype)
    means = (sums / counts[:, None, None]).transpose(0, 1)
    norms = means.norm(dim=2, keepdim=True)
    update = means / norms.clamp(min=NORM_EPS)
    old = memory[:, identities]
    blended = normalize(alpha * old + (1 - alpha) * update, dim=2, eps=NORM_EPS)
    never_seen = (old == 0).all(dim=2, keepdim=True)
    rows = torch.where(norms < NORM_EPS, old, torch.where(never_seen, update, blended))
    memory[:, identities] = rows
    if shadow is not None:
        shadow[:, identities] = rows.to(shadow.dtype)

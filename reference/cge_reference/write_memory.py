"""The moving-average write of a batch's local features into the class memory."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cge_reference.common import accumulation_dtype

NORM_EPS = 1e-12  # a mean feature below this norm counts as zero: it has no direction


@torch.no_grad()
def write_memory_(
    memory: Tensor, local_features: Tensor, labels: Tensor, momentum: float | Tensor,
    low_precision_memory: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Writes the local features (B, n, C) of one optimizer step into the class memory (n, N, C), in place.

    For each identity y of the batch, with u_i = normalise(mean of its f_i):
    M[i,y] <- normalise(momentum * M[i,y] + (1 - momentum) * u_i).
    A zero row (class never seen) takes u_i whatever the momentum is; a zero u_i leaves the row as it is. A label
    outside [0, N) writes nothing. In the copy low_precision_memory the written rows are refreshed.
    """
    valid = (labels >= 0) & (labels < memory.shape[1])
    identities, instance_of = labels[valid].long().unique(return_inverse=True)
    features = local_features[valid].to(accumulation_dtype(memory, local_features))
    sums = features.new_zeros(len(identities), *features.shape[1:]).index_add_(0, instance_of, features)
    counts = instance_of.bincount(minlength=len(identities)).to(features.dtype)
    means = (sums / counts[:, None, None]).transpose(0, 1)
    norms = means.norm(dim=2, keepdim=True)
    update = means / norms.clamp(min=NORM_EPS)
    old = memory[:, identities].to(features.dtype)
    never_seen = (old == 0).all(dim=2, keepdim=True)
    blended = normalize(momentum * old + (1 - momentum) * update, dim=2, eps=NORM_EPS)
    rows = torch.where(norms < NORM_EPS, old, torch.where(never_seen, update, blended))
    memory[:, identities] = rows.to(memory.dtype)
    if low_precision_memory is not None:
        low_precision_memory[:, identities] = rows.to(low_precision_memory.dtype)
    return memory

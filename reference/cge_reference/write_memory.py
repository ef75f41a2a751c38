"""The moving-average write of a batch's local features into the class memory."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cge_reference.checks import accumulation_dtype, require_same_device, require_shape, require_tensor, valid_labels

NORM_EPS = 1e-12  # a mean feature below this norm counts as zero: it has no direction


@torch.no_grad()
def write_memory_(
    memory: Tensor, local_features: Tensor, labels: Tensor, alpha: float | Tensor, shadow: Tensor | None = None
) -> Tensor:
    """Writes the local features of one optimiser step into the class memory, in place (the paper's module NLC).

    For each identity y of the batch, with u_i = normalise(mean of its f_i):
    M[i,y] <- normalise(alpha * M[i,y] + (1 - alpha) * u_i).
    A zero row (class never seen) takes u_i whatever alpha is; a zero u_i leaves the row as it is. Call it after the
    backward pass: autograd still needs the memory that the forward pass read.

    Args:
        memory: (n, N, C), float32 or float64, contiguous; written in place.
        local_features: (B, n, C), floating.
        labels: (B,), integer, in [0, N).
        alpha: a number or a 0-d tensor in [0, 1]: how much of the old row stays.
        shadow: (n, N, C), floating, contiguous, or None: a copy in a smaller dtype whose written rows are refreshed.

    Returns:
        memory itself.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: ranks, shapes or devices do not fit, memory or shadow is not contiguous, alpha (a number or on the
            CPU) is outside [0, 1], or (on the CPU) a label is outside [0, N); on a GPU such a sample writes nothing.
    """
    require_tensor("memory", memory, "(n, N, C)")
    if memory.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"memory must be float32 or float64 (a smaller dtype loses increments), got {memory.dtype}")
    require_tensor("local_features", local_features, "(B, n, C)")
    require_tensor("labels", labels, "(B,)", "an integer")
    require_same_device(memory=memory, local_features=local_features, labels=labels)
    stripes, classes, channels = memory.shape
    batch = local_features.shape[0]
    require_shape("local_features", local_features, (batch, stripes, channels), f"memory {tuple(memory.shape)}")
    require_shape("labels", labels, (batch,), f"local_features {tuple(local_features.shape)}")
    if shadow is not None:
        require_tensor("shadow", shadow, "(n, N, C)")
        require_shape("shadow", shadow, tuple(memory.shape), "memory")
        require_same_device(memory=memory, shadow=shadow)
    for name, tensor in (("memory", memory), ("shadow", shadow)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
    if not (isinstance(alpha, Tensor) and alpha.device.type != "cpu") and not 0 <= float(alpha) <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {float(alpha)}")

    valid = valid_labels(labels, classes)
    identities, instance_of = labels[valid].long().unique(return_inverse=True)
    dtype = accumulation_dtype(memory, local_features)
    features = local_features[valid].to(dtype)
    sums = features.new_zeros(len(identities), stripes, channels).index_add_(0, instance_of, features)
    counts = instance_of.bincount(minlength=len(identities)).to(dtype)
    means = (sums / counts[:, None, None]).transpose(0, 1)
    norms = means.norm(dim=2, keepdim=True)
    update = means / norms.clamp(min=NORM_EPS)
    old = memory[:, identities].to(dtype)
    never_seen = (old == 0).all(dim=2, keepdim=True)
    nothing_new = norms < NORM_EPS
    blended = normalize(alpha * old + (1 - alpha) * update, dim=2, eps=NORM_EPS)
    rows = torch.where(nothing_new, old, torch.where(never_seen, update, blended))
    memory[:, identities] = rows.to(memory.dtype)
    if shadow is not None:
        shadow[:, identities] = rows.to(shadow.dtype)
    return memory

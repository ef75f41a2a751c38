"""The one place where the package takes its operators from."""

from types import ModuleType
from typing import Literal

import torch

import cge_kernels
from cge_fast.errors import UserError
from cge_kernels.common.checks import require_shape, require_tensor, valid_labels
from cge_kernels.common.dispatch import runs_on_triton
from cge_kernels.common.tiles import scratch_bytes
from cge_kernels.cross_entropy.stripe_correct import stripe_correct as local_hits

Kernels = Literal["fused", "one_pass", "reference"]

__all__ = [
    "Kernels",
    "check_backend",
    "local_hits",
    "operators",
    "require_shape",
    "require_tensor",
    "scratch_bytes",
    "valid_labels",
]


def operators(kernels: Kernels) -> ModuleType:
    """The package whose stripe_pool, revise_logits, revised_cross_entropy and write_memory_ are taken.

    "fused" and "one_pass" are cge_kernels, "reference" is cge_reference, which is imported only then.
    """
    if kernels == "reference":
        import cge_reference

        return cge_reference
    return cge_kernels


def check_backend(kernels: Kernels, device: torch.device) -> None:
    """Raises UserError, before any work, if CGE_BACKEND is no backend or one that the device cannot run."""
    if kernels == "reference":  # looks at no CGE_BACKEND
        return
    try:
        runs_on_triton(torch.empty(0, device=device))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error

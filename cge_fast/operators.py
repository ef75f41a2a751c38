"""The one place where the package takes its operators from."""

from types import ModuleType
from typing import Literal

import cge_kernels
from cge_kernels.revised_cross_entropy import local_hits, valid_labels

Kernels = Literal["fused", "one_pass", "reference"]

__all__ = ["Kernels", "local_hits", "operators", "valid_labels"]


def operators(kernels: Kernels) -> ModuleType:
    """The package whose stripe_pool, revise_logits, revised_cross_entropy and write_memory_ are taken.

    "fused" and "one_pass" are cge_kernels, "reference" is cge_reference, which is imported only then.
    """
    if kernels == "reference":
        import cge_reference

        return cge_reference
    return cge_kernels

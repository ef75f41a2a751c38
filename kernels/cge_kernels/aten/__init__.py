"""The operators in ATen operations, blocked so that what is read again is still in the CPU's cache.

Signatures and results as those of the kernels' launchers; float64 too.
"""

from cge_kernels.aten.revise_logits import revise_logits, revise_logits_backward
from cge_kernels.aten.revised_cross_entropy import revised_cross_entropy_backward, revised_statistics
from cge_kernels.aten.stripe_pool import stripe_pool, stripe_pool_backward
from cge_kernels.aten.write_memory import write_memory_

__all__ = [
    "revise_logits",
    "revise_logits_backward",
    "revised_cross_entropy_backward",
    "revised_statistics",
    "stripe_pool",
    "stripe_pool_backward",
    "write_memory_",
]

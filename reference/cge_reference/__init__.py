"""The operators of Comprehensive Global Embedding in plain PyTorch: the truth that fast versions are checked against.

Symbols in every docstring: B batch, C channels, H x W feature map, n stripes, N identities (classes).
The paper: Xi et al., "Learning comprehensive global features in person re-identification: ensuring discriminativeness
of more local regions", Pattern Recognition 134 (2023), 109068; NLC and GLR are its two modules.
"""

from cge_reference.revise_logits import revise_logits
from cge_reference.revise_logits_one_pass import revise_logits_one_pass
from cge_reference.revised_cross_entropy import revised_cross_entropy
from cge_reference.stripe_pool import stripe_pool
from cge_reference.write_memory import write_memory_

__all__ = ["revise_logits", "revise_logits_one_pass", "revised_cross_entropy", "stripe_pool", "write_memory_"]

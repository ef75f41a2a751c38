"""The operators of Comprehensive Global Embedding as fused Triton kernels, and cache-blocked for the CPU.

Symbols in every docstring: B batch, C channels, H x W feature map, n stripes, N identities (classes).
The paper: Xi et al., "Learning comprehensive global features in person re-identification: ensuring discriminativeness
of more local regions", Pattern Recognition 134 (2023), 109068; NLC and GLR are its two modules.

GPU tensors run as Triton kernels, CPU tensors as cache-blocked PyTorch. CGE_BACKEND=auto|triton|cpu|reference, read at
each call, or `with backend(name)` choose otherwise; with TRITON_INTERPRET=1 the kernels run on CPU tensors. The
operators are opaque to torch.compile, never synchronise with the host, and give the same bits from run to run.
"""

from cge_kernels.common.budget import scratch_bytes
from cge_kernels.common.dispatch import backend
from cge_kernels.common.launch import Launch, Target, launching
from cge_kernels.common.sharding import ClassShard
from cge_kernels.cross_entropy.op import revised_cross_entropy
from cge_kernels.cross_entropy.stripe_correct import stripe_correct
from cge_kernels.revise_logits.one_pass import revise_logits_one_pass
from cge_kernels.revise_logits.op import revise_logits
from cge_kernels.stripe_pool.op import stripe_pool
from cge_kernels.write_memory.op import write_memory_

__all__ = [
    "ClassShard", "Launch", "Target", "backend", "launching", "revise_logits", "revise_logits_one_pass",
    "revised_cross_entropy", "scratch_bytes", "stripe_correct", "stripe_pool", "write_memory_",
]  # fmt: skip

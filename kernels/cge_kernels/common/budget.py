"""The scratch budget: what an operator may keep or allocate beyond its results, and the chunks of classes it allows."""

import os

import torch
from torch import Tensor

from cge_kernels.common.dispatch import runs_on_triton
from cge_kernels.common.launch import current_target
from cge_kernels.common.tiles import cdiv, parts_of_channels

SCRATCH_MB = 256  # default of CGE_SCRATCH_MB
SCORE_ROW = 16  # rows of scores are padded to a multiple of this: each starts on a 32-byte boundary in any dtype


def scratch_bytes() -> int:
    """The scratch budget of one operator call, bytes: CGE_SCRATCH_MB (mebibytes) if set, else 256 MiB."""
    text = os.environ.get("CGE_SCRATCH_MB", str(SCRATCH_MB))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"CGE_SCRATCH_MB must be a whole number of mebibytes, got {text!r}")
    return int(text) << 20


def score_row(length: int) -> int:
    """Length of a row in memory for so many scores: rounded up to a multiple of 16, at least that."""
    return cdiv(max(1, length), SCORE_ROW) * SCORE_ROW


def empty_scores(batch: int, memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where revise_logits' forward keeps scores (n, B, row) and inv_norm (n, B) for its backward.

    The scores have no columns if they do not fit in the scratch budget (as float32).
    """
    stripes, classes, _ = memory.shape
    row = score_row(classes) if batch * stripes * score_row(classes) * 4 <= scratch_bytes() else 0
    return memory.new_empty(stripes, batch, row, dtype=dtype), memory.new_empty(stripes, batch, dtype=dtype)


def chunk_of_classes(batch: int, stripes: int, classes: int) -> int:
    """How many classes a backward without kept scores takes at a time: those whose scores fit in the budget."""
    fitting = scratch_bytes() // (max(1, batch) * stripes * 4 * SCORE_ROW) * SCORE_ROW
    return min(score_row(classes), max(SCORE_ROW, fitting))


def kept_parts(batch: int, memory: Tensor) -> int:
    """`parts_of_channels` for these sizes on the memory's GPU; 0, too, if logits and scores of the parts do not fit."""
    stripes, classes, channels = memory.shape
    parts = parts_of_channels(current_target(memory), memory.dtype, batch, stripes, classes, channels)
    fits = (1 + parts) * (stripes + 1) * batch * score_row(classes) * 4 <= scratch_bytes() // 2
    return parts if fits else 0


def empty_logits(like: Tensor, sizes: tuple[int, int, int], dtype: torch.dtype, by_sample: bool) -> Tensor:
    """(classifiers, at least classes, at least B), for sizes (classifiers, classes, B).

    Contiguous, and padded to a score_row, are the samples of a class or, if they lie by_sample, a sample's classes.
    """
    classifiers, classes, batch = sizes
    if by_sample:
        return like.new_empty(classifiers, batch, score_row(classes), dtype=dtype).transpose(1, 2)
    return like.new_empty(classifiers, classes, score_row(batch), dtype=dtype)


def lie_by_sample(logits: Tensor) -> bool:
    """Whether the classes of a sample are contiguous, as `empty_logits` has it."""
    return logits.stride(1) < logits.stride(2)


def empty_saved(batch: int, memory: Tensor, dtype: torch.dtype, on_triton: bool | None = None) -> tuple[Tensor, Tensor]:
    """Where revised_cross_entropy keeps logits and scores (n+1, at least N, at least B) and inv_norm (n, B).

    The former have no rows if they do not fit in half of the budget (as float32). The other half is for their
    gradients, which the backward makes chunk by chunk. They lie by sample where kernels take `kept_parts`.
    on_triton: whether it is kernels that fill them; None: as the backend in force has it.
    """
    stripes, classes, _ = memory.shape
    if on_triton is None:
        on_triton = dtype == torch.float32 and runs_on_triton(memory)
    by_sample = on_triton and kept_parts(batch, memory) > 0
    fits = by_sample or (stripes + 1) * classes * score_row(batch) * 4 <= scratch_bytes() // 2
    rows = classes if fits else 0
    saved_logits = empty_logits(memory, (stripes + 1, rows, batch), dtype, by_sample)
    return saved_logits, memory.new_empty(stripes, batch, dtype=dtype)


def chunk_of_logits(batch: int, stripes: int, classes: int) -> int:
    """How many classes revised_cross_entropy takes at a time: those whose logits and scores fit in half of the budget.

    At least 16, which the budget may be too small for.
    """
    fitting = scratch_bytes() // 2 // ((stripes + 1) * score_row(batch) * 4)
    return min(classes, max(SCORE_ROW, fitting // SCORE_ROW * SCORE_ROW))


def chunk_of_statistics(batch: int, stripes: int, classes: int) -> int:
    """How many classes the forward of revised_cross_entropy takes at a time: half of the budget is for statistics.

    At least 64, the widest tile. A tile of 16 classes, the narrowest, stores for each sample the highest value and its
    class of n + 1 classifiers, and two sums.
    """
    fitting = scratch_bytes() // 2 * 16 // ((8 * (stripes + 1) + 8) * score_row(batch))
    return min(classes, max(64, fitting // 64 * 64))

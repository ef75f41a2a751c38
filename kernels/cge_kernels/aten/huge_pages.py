"""Memory for results as large as a feature map."""

import ctypes
import mmap

import torch
from torch import Tensor

MAPPED_BYTES = 32 << 20  # from here on malloc asks the system for fresh pages each time


def empty_in_huge_pages(tensor: Tensor) -> Tensor:
    """torch.empty_like; a large result is backed by huge pages where the system lends them (Linux).

    Zeroing and mapping fresh pages of 4 KiB at the first write takes several times as long as the write.
    """
    empty = torch.empty_like(tensor)
    if empty.device.type == "cpu" and empty.nbytes >= MAPPED_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-empty.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = empty.data_ptr() + empty.nbytes - first
        # Only a hint: a refusal changes nothing, so the returned code is not looked at.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return empty

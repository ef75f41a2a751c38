"""Memory for results as large as a feature map."""

from threading import Lock

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes; the CPU's allocator may give freed memory of this size back to the system

_lock = Lock()
_last: torch.UntypedStorage | None = None


def recycled_empty_like(tensor: Tensor) -> Tensor:
    """torch.empty_like; a large CPU result takes the memory of the last one, if nobody holds that any more.

    In training each step's gradient has the size of the last step's. Fresh memory is mapped and zeroed by the system
    page by page as it is first written, which takes several times as long as the write. One result's memory is kept.
    """
    global _last
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < LARGE:
        return torch.empty_like(tensor)
    strides = torch.empty_like(tensor, device="meta").stride()
    with _lock:
        is_free = _last is not None and torch._C._storage_Use_Count(_last._cdata) == 1
        if not is_free or _last.nbytes() != tensor.numel() * tensor.element_size():
            _last = torch.empty_like(tensor).untyped_storage()
        return tensor.new_empty(0).set_(_last, 0, tensor.shape, strides)


def release() -> None:
    """Lets go of the kept memory."""
    global _last
    with _lock:
        _last = None

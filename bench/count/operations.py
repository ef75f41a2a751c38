"""ATen operations that code would launch on a GPU, and the bytes that they move, seen by running it on the CPU.

An operation counts if PyTorch's dispatcher runs it (below autograd) and it computes something. It does not if it
- only makes a view (each result shares its storage with an argument, and the operation writes none of them),
- only allocates (its name says "empty"),
- returns no tensor (.item()) or tensors without elements, or
- is the look at labels that only CPU tensors get.
Each counts as one kernel. On a GPU some launch several (indexing by a mask, unique, sums in two steps), so the counts
are lower bounds. The operators of cge_kernels are looked into: their own kernels are no ATen operations, but what they
call besides is. A matmul that they leave to a library counts as one operation: a GPU's library takes 16-bit operands as
they are, the CPU's does not.

Bytes: each argument read once and each result written once, of elements that lie apart in memory (an expanded dimension
counts once). Indexing reads, and an indexed assignment writes, only what the index names.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Operation(NamedTuple):
    """One operation that would launch a kernel: its name ("aten.mul"), the bytes that it reads and writes, and FLOPs.

    FLOPs are those of the matmuls that cge_kernels leaves to a library, whose dtype is its operands'; else 0.
    """

    name: str
    moved: int
    flops: int = 0
    dtype: torch.dtype | None = None


class Operations(TorchDispatchMode):
    """Inside `with Operations() as operations:`, `operations.found` grows by each operation that counts."""

    def __init__(self):
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() == "cge_kernels::product_":
            self.found.append(library_matmul(*args))
            return func(*args)
        if func.name() == "cge_kernels::valid_labels":
            return func(*args)
        if func.namespace == "cge_kernels":
            with self:
                return func.redispatch(ON_CPU, *args, **kwargs)
        with self:  # inside an operator nothing above has taken composite operations apart
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if launches_a_kernel(func, inputs, outputs):
            self.found.append(Operation(str(func.overloadpacket), moved_bytes(func, inputs, outputs)))
        return result


def library_matmul(total: Tensor, a: Tensor, b: Tensor, adds: bool) -> Operation:
    """The operation behind cge_kernels' product_."""
    moved = sum(map(distinct_bytes, (a, b, total))) + (distinct_bytes(total) if adds else 0)
    return Operation("library matmul", moved, 2 * total.numel() * a.shape[-1], a.dtype)


def tensors(arguments: Any) -> list[Tensor]:
    """The tensors among nested arguments."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def launches_a_kernel(func: torch._ops.OpOverload, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation with these arguments and results counts, as the module says."""
    if not any(output.numel() for output in outputs) or "empty" in func.name():
        return False
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    is_view = all(output.untyped_storage().data_ptr() in storages for output in outputs)
    return func._schema.is_mutable or not is_view


def moved_bytes(func: torch._ops.OpOverload, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation reads and writes, as the module says."""
    if func.overloadpacket is aten.index:
        _, *indices = inputs
        return sum(map(distinct_bytes, indices)) + 2 * sum(map(distinct_bytes, outputs))
    if func.overloadpacket is aten.index_put_:
        _, *indices, values = inputs
        return sum(map(distinct_bytes, indices)) + 2 * distinct_bytes(values)
    name = func.overloadpacket.__name__
    if name.startswith("new_") or name.endswith("_like"):  # of their argument they take shape and dtype only
        return sum(map(distinct_bytes, outputs))
    return sum(map(distinct_bytes, inputs + outputs))


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, those of an expanded dimension counted once."""
    apart = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(apart) * tensor.itemsize

"""What the host need not do again for calls of an operator whose arguments are alike.

Choosing tiles, filling in strides and sizes, and Triton's own look at every argument take the host longer than the
kernels take the GPU. So all that does not depend on the tensors' numbers and addresses is settled at the first call;
later calls allocate, add addresses, and launch what was compiled.

Arguments are alike if their tensors agree in shape, strides, dtype, device and alignment, and all else is equal; so
must be what tiles and grids depend on besides: backend, target, torch's matmul precision and the scratch budget.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cge_kernels.common import dispatch, launch
from cge_kernels.common.launch import Launch, Tiles

ALIGNMENT = 128  # bytes; no two pieces of scratch memory share a sector
MAX_CALLS = 1024  # remembered; beyond, all are forgotten
TENSORS = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
AS_IT_IS = nullcontext()

_calls: dict[tuple, "Call"] = {}


class Call:
    """All calls of one operator with arguments alike."""

    __slots__ = ("device", "is_checked", "on_triton", "prepared")

    def __init__(self, tensors: list[Tensor]):
        self.device = max(tensor.get_device() for tensor in tensors)
        self.is_checked = False  # whether the operator has found its arguments right
        self.on_triton: bool | None = None  # None until `runs_on_triton` is asked
        self.prepared: list[Any] | None = None  # what a plan has gathered

    @classmethod
    def of(cls, operator: str, *values: Any) -> "Call":
        """The calls that are alike to one with these values: plain tensors, numbers, None, and tuples of these."""
        key = [operator, dispatch.current_backend(), launch.current_state(), os.environ.get("CGE_SCRATCH_MB")]
        tensors: list[Tensor] = []
        describe(values, key, tensors)
        alike = tuple(key)
        found = _calls.get(alike)
        if found is None:
            if len(_calls) >= MAX_CALLS:
                _calls.clear()
            found = _calls[alike] = cls(tensors)
        return found

    def runs_on_triton(self, inputs: Iterable[Any]) -> bool:
        """What `dispatch.runs_on_triton` says of the tensors among the operator's inputs; asked once."""
        if self.on_triton is None:
            tensors = [value for value in flat(inputs) if isinstance(value, Tensor)]
            self.on_triton = dispatch.runs_on_triton(*tensors)
        return self.on_triton

    def autocast_off(self) -> AbstractContextManager:
        """For the time inside: an operator's dtypes follow from its arguments alone."""
        kind = "cpu" if self.device < 0 else "cuda"
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else AS_IT_IS


def describe(values: tuple, key: list, tensors: list[Tensor]) -> None:
    """Appends to the key what launches depend on, and to the list all tensors."""
    for value in values:
        if value.__class__ in TENSORS:
            key += value.shape, value.stride(), value.dtype, value.get_device(), value.data_ptr() % 16
            tensors.append(value)
        elif isinstance(value, tuple):
            describe(value, key, tensors)
        else:
            key.append(value)


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and in place of tuples what is in them."""
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        else:
            yield value


def forget_calls() -> None:
    """For whoever changes tiles."""
    _calls.clear()


class Plan:
    """One call's launches and scratch memory: `with Plan(call) as plan:`, on the device of the call's tensors.

    Without a call, nothing is remembered.
    """

    __slots__ = ("buffers", "call", "guards", "is_known", "position", "prepared")

    def __init__(self, call: Call | None = None):
        self.call, self.position = call, 0
        self.buffers: list[Tensor] = []
        self.guards: list[AbstractContextManager] = []
        self.is_known = call is not None and call.prepared is not None
        self.prepared: list[Any] = call.prepared if self.is_known else []

    def __enter__(self) -> Self:
        device = -1 if self.call is None else self.call.device
        if device >= 0 and device != torch.cuda.current_device():
            self.guards.append(torch.cuda.device(device))
        if self.call is not None and (off := self.call.autocast_off()) is not AS_IT_IS:
            self.guards.append(off)
        for guard in self.guards:
            guard.__enter__()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        for guard in self.guards:
            guard.__exit__(kind, *error)
        if kind is None and self.call is not None:
            self.call.prepared = self.prepared

    def once(self, make: Callable[[], Any]) -> Any:
        """What `make` gives: made at the first of the calls, then remembered. It may depend on no number or address."""
        if self.is_known:
            self.position += 1
            return self.prepared[self.position - 1]
        self.prepared.append(make())
        return self.prepared[-1]

    def scratch(self, like: Tensor, pieces: Callable[[], list["Piece"]]) -> list[Any]:
        """Memory for the pieces on the device of `like`, for kernels alone and until the plan's end.

        Once these are compiled, it is one allocation, and the pieces are addresses; till then they are tensors.
        """
        layout = self.once(lambda: Layout(pieces()))
        if not (self.is_known and launch.is_direct()):
            return [piece.tensor(like) for piece in layout.pieces]
        buffer = like.new_empty(layout.bytes, dtype=torch.uint8)
        self.buffers.append(buffer)
        start = buffer.data_ptr()
        return [start + offset for offset in layout.offsets]

    def launch(self, kernel: Any, tensors: dict[str, Any], make: Callable[[], tuple]) -> None:
        """Launches a kernel on tensors, named and ordered as its pointers.

        make: gives programs, tiles, scalars (in upper case tl.constexpr) and, where there are any, launch options. As
        in `once`.
        """
        prepared = self.once(lambda: Prepared(kernel, tensors, *make()))
        if prepared.compiled is not None:
            prepared.compiled(*tensors.values(), *prepared.positional)
        elif (compiled := launch.taker()(prepared.launch(tensors))) is not None and launch.is_direct():
            prepared.compiled = compiled[(*prepared.grid, 1, 1)]


class Prepared:
    """A launch without its tensors."""

    __slots__ = ("compiled", "constants", "grid", "kernel", "options", "positional", "scalars")

    def __init__(
        self, kernel: Any, tensors: dict[str, Tensor | None], programs: int, tiles: Tiles, scalars: dict[str, Any],
        options: dict[str, Any] | None = None,
    ):  # fmt: skip
        rest = launch.bind(kernel, tensors, **scalars, **tiles.blocks)
        self.kernel, self.grid, self.options = kernel, (programs,), tiles.options | (options or {})
        self.scalars = {name: value for name, value in rest.items() if not name.isupper()}
        self.constants = {name: value for name, value in rest.items() if name.isupper()}
        self.positional = tuple(rest.values())
        self.compiled: Callable | None = None  # what launches it, once it has run on a GPU

    def launch(self, tensors: dict[str, Tensor | None]) -> Launch:
        """With these tensors."""
        args = {f"{name}_ptr": tensor for name, tensor in tensors.items()} | self.scalars
        return Launch(self.kernel, self.grid, args, self.constants, self.options)


class Piece(NamedTuple):
    """Scratch memory for a tensor of this shape; contiguous without strides."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """How many it spans."""
        if self.strides is None:
            return prod(self.shape) * self.dtype.itemsize
        ends = [(size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)]
        return (1 + sum(ends)) * self.dtype.itemsize

    def tensor(self, like: Tensor) -> Tensor:
        """A tensor of its own."""
        if self.strides is None:
            return like.new_empty(self.shape, dtype=self.dtype)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=like.device)


class Layout:
    """Where the pieces of an allocation lie, each on a boundary of ALIGNMENT bytes."""

    def __init__(self, pieces: list[Piece]):
        self.pieces, self.offsets, self.bytes = pieces, [], 0
        for piece in pieces:
            self.offsets.append(self.bytes)
            self.bytes += -(-piece.bytes // ALIGNMENT) * ALIGNMENT


def run(operator: str, on_triton: Callable, on_cpu: Callable, *inputs: Any) -> Any:
    """on_triton(plan, *inputs) or on_cpu(*inputs), as the backend in force has it."""
    call = Call.of(operator, *inputs)
    if call.runs_on_triton(inputs):
        with Plan(call) as plan:
            return on_triton(plan, *inputs)
    with call.autocast_off():
        return on_cpu(*inputs)


class NoSecondDerivative(torch.autograd.Function):
    """Hands gradients on, and refuses theirs."""

    @staticmethod
    def forward(ctx, *gradients):
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("cge_kernels: the operators have no second derivative")


def autograd_function(
    name: str, on_triton: Callable, on_cpu: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    """(*inputs, call) -> what `run` gives, with a gradient from what torch.library.register_autograd takes."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs_and_call):
            *inputs, call = inputs_and_call
            if call.runs_on_triton(inputs):
                with Plan(call) as plan:
                    output = on_triton(plan, *inputs)
            else:
                with call.autocast_off():
                    output = on_cpu(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            if not torch.is_grad_enabled():
                return *backward(ctx, *gradients), None
            with torch.no_grad():
                results = backward(ctx, *gradients)
            leaves = [None if result is None else result.detach().requires_grad_() for result in results]
            return *NoSecondDerivative.apply(*leaves), None  # somebody may want to differentiate them once more

    Eager.__name__ = name
    return Eager.apply

"""Triton's language and device functions of several kernels; stand-ins where Triton is not installed.

With the stand-ins the package can be imported, and runs on the CPU's implementation.
"""

try:
    import triton
    import triton.language as tl
    from triton import jit

    # Triton looks at TRITON_INTERPRET when a kernel is decorated, so what counts is its value at import.
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
    NORM_EPS = tl.constexpr(1e-12)  # lower bound of a feature's length; below it a feature has no direction
except ImportError:
    triton, INTERPRETED, NORM_EPS = None, None, None

    class tl:  # type: ignore[no-redef]  # noqa: N801
        """What the kernels' signatures need."""

        constexpr = None

    def jit(kernel):
        """Leaves the kernel a plain function that nobody calls."""
        return kernel


def mend_interpreted_ranges() -> None:
    """Lets interpreted kernels say range(tensor) with NumPy 2.5, which refuses int() of an array with one element.

    Triton does it from 3.7 on: goes when that is the oldest supported.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_and_mend


if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    mend_interpreted_ranges()


@jit
def product(a, b):
    """a * b, rounded before it enters a sum.

    A compiler fuses a * b into an addition; where that addition is between lanes, each lane would add its own exact
    product to the other's rounded one. The lanes then hold different last bits of one sum, and which one is stored is
    not defined. fma(a, b, +0) is not fused again.
    """
    return tl.fma(a, b, tl.zeros_like(a))


@jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32; the interpreter knows no bfloat16 product."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@jit
def multiply(
    rows_ptr, columns_ptr, row_mask, column_mask, first, end, depth, row_stride, column_stride, accumulator,
    dtype: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """accumulator (rows, columns) + rows @ columns, both converted to a dtype, over first..end-1 of a common axis.

    rows_ptr (rows, 1) and columns_ptr (1, columns) point to their numbers 0 of `depth`; the numbers of a row are
    row_stride apart, those of a column column_stride. first, and end unless it is depth, are multiples of BLOCK_K.
    """
    block = tl.arange(0, BLOCK_K)
    for start in range(first, end, BLOCK_K):
        channel = start + block
        inside = channel < depth
        wide = channel.to(tl.int64)
        rows = tl.load(rows_ptr + wide[None, :] * row_stride, mask=row_mask[:, None] & inside[None, :], other=0.0)
        columns = tl.load(
            columns_ptr + wide[:, None] * column_stride, mask=inside[:, None] & column_mask[None, :], other=0.0
        )
        accumulator = dot(rows.to(dtype), columns.to(dtype), accumulator, PRECISION)
    return accumulator


@jit
def sum_parts(parts_ptr, row, sample, sample_mask, stripe, parts, BLOCK_B: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """(BLOCK_B,) sums over the middle axis of (n, parts, row) float32, in a fixed order."""
    total = tl.zeros([BLOCK_PARTS, BLOCK_B], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        offsets = (stripe * parts + part).to(tl.int64)[:, None] * row + sample[None, :]
        mask = (part < parts)[:, None] & sample_mask[None, :]
        total += tl.load(parts_ptr + offsets, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@jit
def log_sigmoid(score):
    """For scores in [-1, 1], where exp neither overflows nor vanishes."""
    return -tl.log(1.0 + tl.exp(-score))

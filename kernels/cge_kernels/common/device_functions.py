"""Triton's language, or stand-ins that let the package be imported, and run on ATen, where Triton is not installed."""

try:
    import triton
    import triton.language as tl
    from triton import jit

    # Triton looks at TRITON_INTERPRET when a kernel is decorated, so what counts is its value at import.
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
except ImportError:
    triton, INTERPRETED = None, None

    class tl:  # noqa: N801
        """What the kernels' signatures need."""

        constexpr = None

    def jit(kernel):
        """Leaves the kernel a plain function that nobody calls."""
        return kernel


@jit
def product(a, b):
    """a * b, rounded before it enters a sum.

    A compiler fuses a * b into an addition; where that addition is between lanes, each lane would add its own exact
    product to the other's rounded one. The lanes then hold different last bits of one sum, and which one is stored is
    not defined. fma(a, b, +0) is not fused again.
    """
    return tl.fma(a, b, tl.zeros_like(a))


__all__ = ["INTERPRETED", "jit", "product", "tl", "triton"]

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


__all__ = ["INTERPRETED", "jit", "tl", "triton"]

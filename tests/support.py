"""Where the kernels' tests run, and how far they may be from float64.

With a GPU the kernels run on it, compiled; without one, in Triton's interpreter on the CPU.
"""

import torch

GPU = torch.cuda.is_available()
KERNEL_DEVICE = "cuda" if GPU else "cpu"

# Relative error of one rounding to a dtype: half a unit in the last place, but the interpreter cuts bfloat16 off.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-9 if GPU else 2.0**-7,
}


def assert_within(actual: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor | float) -> None:
    """Raises unless |actual - truth| <= bound, elementwise; nothing may be NaN."""
    actual = actual.detach().cpu().double()
    truth = truth.detach().cpu().double()
    assert actual.shape == truth.shape
    excess = (actual - truth).abs() - torch.as_tensor(bound, dtype=torch.float64)
    worst = excess.max().item() if excess.numel() else -1.0
    assert worst <= 0, f"exceeds its bound by {worst:.3g}; largest value {truth.abs().max().item():.3g}"

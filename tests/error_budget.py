"""How far an operator's results and gradients may be from the truth.

    |truth - ours| <= |truth - reference| + tolerance, elementwise

truth: cge_reference in float64. reference: cge_reference in the dtypes of the arguments, which rounds the operands of a
product as ours does. tolerance: the most that the roundings of ours can add up to. Each operator's tests derive it from
dtypes, number of additions and size of the terms: n additions in any order are off by at most n roundings of the sum of
the terms' sizes.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from support import GPU
from torch import Tensor

import cge_kernels
import cge_reference

Arguments = dict[str, Any]

# Relative error of one rounding to a dtype: half a unit in the last place, but the interpreter cuts bfloat16 off.
ROUNDING = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-9 if GPU else 2.0**-7,
}
RESULTS = {
    "stripe_pool": ("global_feature", "local_features"),
    "revise_logits": ("revised",),
    "revise_logits_one_pass": ("revised", "local_features"),
    "revised_cross_entropy": ("loss", "correct", "stripe_correct"),
}


def assert_within_budget(ours: Tensor, truth: Tensor, reference: Tensor, tolerance: Tensor | float, name: str) -> None:
    """Raises unless ours has the reference's dtype and each number is within its budget; NaN never is.

    The rounding with which ours is stored belongs to the budget.
    """
    assert ours.dtype == reference.dtype, f"{name}: {ours.dtype} in place of {reference.dtype}"
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)} in place of {tuple(truth.shape)}"
    stored = ROUNDING[ours.dtype] * truth.abs() + subnormal(ours.dtype)
    budget = (reference.double() - truth).abs() + tolerance + stored
    excess = (ours.double() - truth).abs() - budget
    worst = excess.max().item() if excess.numel() else -1.0
    assert worst <= 0, f"{name} exceeds its budget by {worst:.3g}; largest value {truth.abs().max().item():.3g}"


def subnormal(dtype: torch.dtype) -> float:
    """The smallest positive number of a dtype."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def accumulation(arguments: Arguments) -> torch.dtype:
    """The dtype of an operator's sums: float64 if an argument has it, else float32."""
    has_float64 = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in arguments.values())
    return torch.float64 if has_float64 else torch.float32


def in_float64(arguments: Arguments) -> Arguments:
    """The arguments with every floating tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def uneven(tensor: Tensor) -> Tensor:
    """A gradient of a result, normally distributed."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(tensor.shape, dtype=torch.float64, generator=random).to(tensor)


def named(operator: str, results: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """An operator's results by name."""
    return dict(zip(RESULTS[operator], results if isinstance(results, tuple) else (results,), strict=True))


def differentiate(
    package: ModuleType, operator: str, arguments: Arguments, learnt: tuple[str, ...], upstream: dict[str, Tensor]
) -> dict[str, Tensor | None]:
    """Results by name, and the gradient of each learnt argument as "grad_" and its name.

    upstream: gradients of results; of a result that has none no gradient flows.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in learnt if arguments[name] is not None}
    results = named(operator, getattr(package, operator)(**(arguments | leaves)))
    used = [name for name in upstream if results[name].requires_grad]
    torch.autograd.backward([results[name] for name in used], [upstream[name].to(results[name].dtype) for name in used])
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach() for name, value in results.items()} | gradients


def check_parity(
    operator: str,
    arguments: Arguments,
    learnt: tuple[str, ...],
    tolerance: Callable[..., dict[str, Tensor | float]],
    backend: str,
    used: tuple[str, ...] | None = None,
    skip: tuple[str, ...] = (),
) -> dict[str, Tensor | None]:
    """Holds an operator's results and gradients on a backend against their budgets; returns them.

    tolerance: called as tolerance(unit, upstream, **arguments in float64), where unit is the relative error of one
    rounding of the sums and upstream the results' gradients; returns the tolerance of each floating result and
    gradient. Results that are not floating must be equal. used: results that have a gradient; all if None. skip:
    results that are not compared.
    """
    results = named(operator, getattr(cge_reference, operator)(**arguments))
    floating = {name: value for name, value in results.items() if value.is_floating_point()}
    upstream = {name: uneven(value) for name, value in floating.items() if used is None or name in used}
    exact = in_float64(arguments)
    reference = differentiate(cge_reference, operator, arguments, learnt, upstream)
    truth = differentiate(cge_reference, operator, exact, learnt, upstream)
    with cge_kernels.backend(backend):
        ours = differentiate(cge_kernels, operator, arguments, learnt, upstream)

    sums = accumulation(arguments)
    allowed = tolerance(ROUNDING[sums], in_float64(upstream), **exact)
    doubled = 2 if sums == torch.float64 else 1  # the truth has such roundings too then
    for name in ours.keys() - set(skip):
        if truth[name] is None:
            assert ours[name] is None, f"{name}: a gradient in place of None"
        elif not truth[name].is_floating_point():
            assert torch.equal(ours[name], truth[name]), name
        else:
            assert_within_budget(ours[name], truth[name], reference[name], doubled * allowed[name], name)
    return ours

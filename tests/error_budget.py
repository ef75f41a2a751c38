"""How far an operator's results and gradients may be from the truth.

    |truth - ours| <= |truth - reference| + tolerance, elementwise

truth: cge_reference in float64. reference: cge_reference in the dtypes of the arguments. tolerance: the most that the
roundings of ours can add up to, derived below for each operator from dtypes, number of additions and size of the terms:
n additions in any order are off by at most n roundings of the sum of the terms' sizes.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

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
TF32 = 2 * 2.0**-10  # of a product whose two operands lose all but 10 bits behind the point
RESULTS = {
    "stripe_pool": ("global_feature", "local_features"),
    "revise_logits": ("revised",),
    "revise_logits_one_pass": ("revised", "local_features"),
    "revised_cross_entropy": ("loss", "correct", "stripe_correct"),
}
LEARNT = ("feature_map", "p", "logits", "features", "weight", "bias", "local_features")


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
    package: ModuleType, operator: str, arguments: Arguments, upstream: dict[str, Tensor]
) -> dict[str, Tensor | None]:
    """Results by name, and the gradient of each learnt argument that is not None as "grad_" and its name.

    upstream: gradients of results; of a result that has none no gradient flows.
    """
    given = [name for name in LEARNT if arguments.get(name) is not None]
    leaves = {name: arguments[name].detach().requires_grad_() for name in given}
    results = named(operator, getattr(package, operator)(**(arguments | leaves)))
    used = [name for name in upstream if results[name].requires_grad]
    torch.autograd.backward([results[name] for name in used], [upstream[name].to(results[name].dtype) for name in used])
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach() for name, value in results.items()} | gradients


class Budget(NamedTuple):
    """What results and gradients by name may be, and the results' gradients that they follow from."""

    truth: dict[str, Tensor | None]
    reference: dict[str, Tensor | None]
    tolerance: dict[str, Tensor]
    upstream: dict[str, Tensor]

    def check(self, name: str, ours: Tensor | None, part: Any = ...) -> None:
        """Raises unless `ours` is within the budget of a part of a result or gradient; flags must be equal."""
        truth, reference = self.truth[name], self.reference[name]
        if truth is None:
            assert ours is None, f"{name}: a gradient in place of None"
        elif not truth.is_floating_point():
            assert torch.equal(ours, truth[part]), name
        else:
            tolerance = self.tolerance[name].expand_as(truth)
            assert_within_budget(ours, truth[part], reference[part], tolerance[part], name)


def budget(operator: str, arguments: Arguments, used: tuple[str, ...] | None = None) -> Budget:
    """Of an operator on these arguments. used: results that have a gradient; all if None."""
    results = named(operator, getattr(cge_reference, operator)(**arguments))
    floating = {name: value for name, value in results.items() if value.is_floating_point()}
    upstream = {name: uneven(value) for name, value in floating.items() if used is None or name in used}
    exact = in_float64(arguments)
    tolerance = TOLERANCE[operator](rounding_of(arguments), in_float64(upstream), **exact)
    if accumulation(arguments) == torch.float64:  # the truth has such roundings too then
        tolerance = {name: 2 * value for name, value in tolerance.items()}
    truth = differentiate(cge_reference, operator, exact, upstream)
    return Budget(truth, differentiate(cge_reference, operator, arguments, upstream), tolerance, upstream)


def check_parity(
    operator: str, arguments: Arguments, backend: str, used: tuple[str, ...] | None = None, skip: tuple[str, ...] = ()
) -> dict[str, Tensor | None]:
    """Holds an operator's results and gradients on a backend against their budgets; returns them.

    skip: results that are not compared. used: as in `budget`.
    """
    allowed = budget(operator, arguments, used)
    with cge_kernels.backend(backend):
        ours = differentiate(cge_kernels, operator, arguments, allowed.upstream)
    for name in ours.keys() - set(skip):
        allowed.check(name, ours[name])
    return ours


class Rounding(NamedTuple):
    """Relative errors: `unit` of one rounding of a sum, `cast` of a product's operand to the memory's dtype."""

    unit: float
    cast: float


def rounding_of(arguments: Arguments) -> Rounding:
    """What an operator on these arguments rounds."""
    sums, memory = accumulation(arguments), arguments.get("memory")
    if memory is None or memory.dtype == torch.float64:
        return Rounding(ROUNDING[sums], 0.0)
    if memory.dtype == torch.float32:
        return Rounding(ROUNDING[sums], TF32 if GPU and cge_kernels.common.launch.takes_tf32() else 0.0)
    return Rounding(ROUNDING[sums], ROUNDING[memory.dtype])


EPS = 1e-6  # stripe_pool's lower bound of the activations
FEW = 8  # roundings of elementary functions and products one after the other
# Roundings of exp2, and what it makes of its exponent's, ln 2 of each: in x^p, in the root and in (x / f)^(p-1). On a
# GPU it has 2 units in the last place, log2 1 and an approximate quotient 2 (CUDA C++ Programming Guide).
EXP2, POWER, ROOT, RATIO = (4, 2.1, 4.2, 2.8) if GPU else (1, 2, 2, 2)


class PoolRoundings(NamedTuple):
    """How many relative roundings the features have, and a gradient of the map; |ln x| + |ln f| of each activation."""

    features: dict[str, Tensor | float]
    gradient: Tensor | float
    logs: Tensor | float


def pool_roundings(feature_map: Tensor, stripes: int, p: Tensor | None) -> PoolRoundings:
    """Of stripe_pool on a float64 map.

    A mean of x^p is off by its additions and its powers: exp2(p log2 x) makes POWER |p log2 x| of the roundings in its
    exponent, and has EXP2 of its own. The root divides this by p, has ROOT |log2 f|, and EXP2, which nothing divides.
    In dx = g / count (x / f)^(p-1) logarithms, difference and product have RATIO times p - 1; the power has EXP2.
    """
    additions = feature_map.shape[2] * feature_map.shape[3] + FEW
    if p is None:
        return PoolRoundings(dict.fromkeys(RESULTS["stripe_pool"], additions), additions, 0.0)
    log_x, powers = (positive := feature_map.clamp(min=EPS)).log2().abs(), positive.pow(p)
    sums = cge_reference.stripe_pool(powers * log_x, stripes), cge_reference.stripe_pool(powers, stripes)
    log_f = [feature.log2().abs() for feature in cge_reference.stripe_pool(feature_map, stripes, p)]
    features = {
        name: additions / p.abs() + EXP2 * (1 + 1 / p.abs()) + POWER * logs / weights + ROOT * log
        for name, logs, weights, log in zip(RESULTS["stripe_pool"], *sums, log_f, strict=True)
    }
    worst, farthest = (
        torch.maximum(whole, parts.amax(dim=1))[:, :, None, None] for whole, parts in (features.values(), log_f)
    )
    gradient = additions + EXP2 + (p - 1).abs() * (worst + RATIO * (log_x + farthest))
    return PoolRoundings(features, gradient, (log_x + farthest) * math.log(2))


def map_gradient(feature_map: Tensor, stripes: int, p: Tensor | None, upstream: dict[str, Tensor]) -> Tensor:
    """The map's gradient; that of positive upstream gradients is the size of terms that may cancel."""
    leaf = feature_map.detach().requires_grad_()
    features = named("stripe_pool", cge_reference.stripe_pool(leaf, stripes, p))
    torch.autograd.backward([features[name] for name in upstream], list(upstream.values()))
    return leaf.grad


def exponent_gradient(feature_map: Tensor, p: Tensor, grad_map: Tensor, logs: Tensor) -> Tensor:
    """The size of dp = (1/p) sum of x dx ln(x / f)."""
    return (feature_map.clamp(min=EPS) * grad_map * logs).sum() / p.abs()


def pool_tolerance(rounding, upstream, feature_map, stripes, p):
    """Of stripe_pool: features and gradients have `pool_roundings`; dp is summed over a plane, then over all planes."""
    batch, channels, height, width = feature_map.shape
    roundings = pool_roundings(feature_map, stripes, p)
    sizes = named("stripe_pool", cge_reference.stripe_pool(feature_map.abs() if p is None else feature_map, stripes, p))
    terms = map_gradient(feature_map, stripes, p, {name: grad.abs() for name, grad in upstream.items()})
    tolerance = {name: roundings.features[name] * rounding.unit * size for name, size in sizes.items()}
    tolerance["grad_feature_map"] = roundings.gradient * rounding.unit * terms
    if p is not None:
        errors = (roundings.gradient + height * width + batch * channels) * rounding.unit * terms
        tolerance["grad_p"] = exponent_gradient(feature_map, p, errors, roundings.logs)
    return tolerance


def score_error(rounding: Rounding, channels: int, features_error: float = 0.0) -> float:
    """Of a score: a sum of C products whose sizes add up to 1 at most (Cauchy and Schwarz).

    A relative error of the features is in their product and in their length. log w is no farther off than the scores.
    """
    return rounding.cast + (channels + FEW) * rounding.unit + 2 * features_error


def projected(grad_unit: Tensor, unit_features: Tensor, length: Tensor) -> Tensor:
    """The size of df = (du - u <u, du>) / ||f|| from that of du, (B, n, C)."""
    along = (unit_features.abs() * grad_unit).sum(dim=2, keepdim=True)
    return (grad_unit + unit_features.abs() * along) / length


def revise_tolerance(rounding, upstream, logits, local_features, memory, local_gradient=True, features_error=0.0):
    """Of revise_logits: revised = p w and dp = g w are off by the scores.

    df = (du - u <u, du>) / ||f||, du_i = ds_i M_i: ds is off by its scores, twice, and cast for the product; the sums
    run over N, and the projection's over C. features_error: relative, of the local features.
    """
    stripes, classes, channels = memory.shape
    score = score_error(rounding, channels, features_error)
    length = local_features.norm(dim=2, keepdim=True)
    unit_features = local_features / length
    scores = torch.einsum("bic,ikc->bik", unit_features, memory)
    weights = scores.sigmoid().log().mean(dim=1).exp()
    grad = upstream["revised"].abs()
    grad_scores = (grad * logits.abs() * weights)[:, None] * (1 - scores.sigmoid()) / stripes
    roundings = rounding.cast + 2 * score + (classes + channels + FEW) * rounding.unit
    sizes = projected(torch.einsum("bik,ikc->bic", grad_scores, memory.abs()), unit_features, length)
    return {
        "revised": score * logits.abs() * weights,
        "grad_logits": score * grad * weights,
        "grad_local_features": (roundings + 3 * features_error) * sizes,
    }


def one_pass_tolerance(rounding, upstream, feature_map, logits, memory, p):
    """Of revise_logits_one_pass: pooling's errors go through the revision, and the revision's back through the pooling.

    The map must be positive, so that pooling has a relative error.
    """
    batch, channels, height, width = feature_map.shape
    stripes = len(memory)
    roundings = pool_roundings(feature_map, stripes, p)
    _, local_features = cge_reference.stripe_pool(feature_map, stripes, p)
    relative = roundings.features["local_features"] * rounding.unit
    arguments = {"logits": logits, "local_features": local_features, "memory": memory}
    worst = torch.as_tensor(relative).max().item()
    revision = revise_tolerance(rounding, upstream, **arguments, features_error=worst)
    exact = differentiate(cge_reference, "revise_logits", arguments, {"revised": upstream["revised"]})
    grad_local = upstream["local_features"].abs() + exact["grad_local_features"].abs()
    terms = map_gradient(feature_map, stripes, p, {"local_features": grad_local})
    errors = map_gradient(feature_map, stripes, p, {"local_features": revision.pop("grad_local_features")})
    tolerance = revision | {"local_features": relative * local_features}
    tolerance["grad_feature_map"] = errors + roundings.gradient * rounding.unit * terms
    if p is not None:
        errors = errors + (roundings.gradient + height * width + batch * channels) * rounding.unit * terms
        tolerance["grad_p"] = exponent_gradient(feature_map, p, errors, roundings.logs)
    return tolerance


def cross_entropy_tolerance(
    rounding, upstream, features, weight, local_features, memory, labels, label_smoothing=0.1, local_gradient=True,
    bias=None,
):  # fmt: skip
    """Of revised_cross_entropy; the steps are those of its formulas.

    Both operands of the classifier's product are cast. The loss is off by the largest error of its exponents, once in
    log_sum and once in the label's logit.
    """
    unit, cast = rounding
    (batch, width), (stripes, classes, channels) = features.shape, memory.shape
    length = local_features.norm(dim=2, keepdim=True)
    unit_features = local_features / length
    scores = torch.einsum("bic,ikc->ibk", unit_features, memory)
    weights = scores.sigmoid().log().mean(dim=0).exp()
    revised = (features @ weight.T + (0 if bias is None else bias)) * weights
    score = score_error(rounding, channels)
    sizes = features.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    revised_error = (2.1 * cast + (width + FEW) * unit) * sizes * weights + score * revised.abs()
    worst = revised_error.amax(dim=1, keepdim=True)
    log_sum = revised.logsumexp(dim=1, keepdim=True)
    sums = (classes + FEW) * unit
    own = revised.gather(1, labels[:, None].long())
    loss = 2 * worst + sums * (1 + revised.abs().mean(dim=1, keepdim=True)) + FEW * unit * (log_sum.abs() + own.abs())

    grad = upstream["loss"].abs()[:, None]
    softmax = (revised - log_sum).exp()
    target = torch.full_like(softmax, label_smoothing / classes)
    target.scatter_add_(1, labels[:, None].long(), torch.full_like(own, 1 - label_smoothing))
    grad_revised = grad * (softmax - target).abs()
    exponent = 2 * worst + sums + FEW * unit * (1 + log_sum.abs())
    assert exponent.max() < 0.5  # so that exp(error) - 1 < 2 * error
    grad_error = grad * (2 * exponent * softmax + FEW / 2 * unit * (softmax + target))
    grad_logits = grad_revised * weights
    logits_error = grad_error * weights + (score + FEW / 2 * unit + cast) * grad_logits
    over_batch = logits_error + (cast + (batch + FEW) * unit) * grad_logits
    over_classes = logits_error + (cast + sums) * grad_logits
    slope = (1 - scores.sigmoid()) / stripes
    grad_scores = grad_revised * revised.abs() * slope
    scores_error = (grad_error * revised.abs() + grad_revised * revised_error) * slope
    scores_error = scores_error + (score + 2 * cast + sums + (channels + FEW) * unit) * grad_scores
    return {
        "loss": loss[:, 0],
        "grad_features": over_classes @ weight.abs(),
        "grad_weight": over_batch.T @ features.abs(),
        "grad_bias": over_batch.sum(dim=0),
        "grad_local_features": projected(
            torch.einsum("ibk,ikc->bic", scores_error, memory.abs()), unit_features, length
        ),
    }


TOLERANCE = {
    "stripe_pool": pool_tolerance,
    "revise_logits": revise_tolerance,
    "revise_logits_one_pass": one_pass_tolerance,
    "revised_cross_entropy": cross_entropy_tolerance,
}

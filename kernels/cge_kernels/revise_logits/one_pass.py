"""Pooling, local classification and revision in one launch, from feature map to revised logits.

A persistent grid of as many programs as are resident: they pool the map tile by tile (stripe_pool's pool_tile), meet at
a grid-wide barrier, and revise the logits tile by tile (forward.py's revise_tile). Between them lie only the local
features and their squared lengths, which the L2 cache holds. The matmul leaves room for two or three programs on each
multiprocessor; so that the pooling has enough loads in flight there, its tiles are larger than stripe_pool's.

It pays where the logits do not depend on this map's pooling: scoring against given logits, distillation, a classifier
on another branch. In CGE's own training the logits come from the global feature of the same map, so it has been read
once before, and stripe_pool followed by revise_logits moves half the bytes.

The backward is that of stripe_pool and revise_logits. The barrier: all warps' stores come before the arrival, since
tl.debug_barrier stands between (Triton puts no barrier before an atomic of one thread); arriving releases them at GPU
scope, and the spin acquires. The counter is fresh for each call: a shared one would mix two streams and keep what an
aborted launch left. The launch is cooperative: the driver refuses a grid that would not be resident as a whole.
"""

from typing import Any

import torch
from torch import Tensor

from cge_kernels.common import checks
from cge_kernels.common.budget import empty_scores, score_row
from cge_kernels.common.device_functions import jit, tl
from cge_kernels.common.dispatch import is_traced, runs_on_reference
from cge_kernels.common.launch import Tiles, current_target, float32_precision
from cge_kernels.common.plan import Call, Piece, Plan, autograd_function, run
from cge_kernels.common.tiles import ONE_PASS_POOL, block_of_parts, cdiv, contiguous_axis, one_pass_tiles
from cge_kernels.revise_logits import cpu
from cge_kernels.revise_logits.backward import revise_backward, revise_logits_backward_op
from cge_kernels.revise_logits.forward import revise_tile
from cge_kernels.stripe_pool import cpu as pool_cpu
from cge_kernels.stripe_pool.op import check_pooling, exponent, pool_backward, stripe_pool_backward_op
from cge_kernels.stripe_pool.triton import map_constants, pool_tile


@jit
def grid_barrier(counter_ptr):
    """Returns when every program of the grid has arrived; what they stored before can then be loaded."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < tl.num_programs(0):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@jit
def one_pass_kernel(
    map_ptr, p_ptr, local_ptr, converted_ptr, local_cast_ptr, partial_sq_norms_ptr, counter_ptr, logits_ptr,
    memory_ptr, revised_ptr, scores_ptr, inv_norm_ptr,
    eps, batch, channels, map_stride_0, map_stride_1, map_stride_2, map_stride_3, classes, logits_stride_0,
    logits_stride_1, partial_sq_norms_stride_1, scores_stride_1,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIPES: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A persistent grid; pointers as in pool_tile and revise_tile, and

    converted_ptr: (B, n, C), the local features in the memory's dtype; None where that is float32
    local_cast_ptr: whichever of local_ptr and converted_ptr the matmul reads
    counter_ptr: (1,) int32, 0
    """
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    for tile in range(tl.program_id(0), batch * channel_tiles, tl.num_programs(0)):
        pool_tile(
            map_ptr, p_ptr, eps, None, local_ptr, converted_ptr, partial_sq_norms_ptr,
            tile // channel_tiles, tile % channel_tiles, channels, channel_tiles, partial_sq_norms_stride_1,
            map_stride_0, map_stride_1, map_stride_2, map_stride_3,
            HEIGHT, WIDTH, STRIPES, FLAT, BLOCK_C, BLOCK_S,
        )  # fmt: skip
    grid_barrier(counter_ptr)
    batch_tiles = tl.cdiv(batch, BLOCK_B)
    for tile in range(tl.program_id(0), batch_tiles * tl.cdiv(classes, BLOCK_N), tl.num_programs(0)):
        revise_tile(
            logits_ptr, local_cast_ptr, partial_sq_norms_ptr, memory_ptr, revised_ptr, scores_ptr, inv_norm_ptr,
            tile % batch_tiles, tile // batch_tiles, batch, classes, channels, channel_tiles,
            logits_stride_0, logits_stride_1, tl.cast(classes, tl.int64) * channels,
            STRIPES * channels, channels, 1, partial_sq_norms_stride_1, scores_stride_1,
            STRIPES, PRECISION, BLOCK_PARTS, BLOCK_B, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def launch_forward(
    plan: Plan, feature_map: Tensor, logits: Tensor, memory: Tensor, p: Tensor | None, eps: float,
    local_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Revised logits (B, N), local features (B, n, C), scores and inv_norm as revise_logits has them."""
    batch, channels = feature_map.shape[:2]
    stripes, classes, _ = memory.shape
    converts = memory.dtype != torch.float32
    channel_tiles = cdiv(channels, ONE_PASS_POOL[contiguous_axis(feature_map)]["BLOCK_C"])

    def pieces() -> list[Piece]:
        converted = Piece((batch, stripes, channels), memory.dtype)
        return [Piece((stripes, channel_tiles, score_row(batch)), torch.float32), *[converted][:converts]]

    def prepare() -> tuple[int, Tiles, dict[str, Any], dict[str, Any]]:
        target, pool = current_target(feature_map), ONE_PASS_POOL[contiguous_axis(feature_map)]
        constants = map_constants(stripes, feature_map)
        matmul, resident = one_pass_tiles(target, memory.dtype, batch, classes, bool(constants["FLAT"]))
        class_tiles = cdiv(batch, matmul["BLOCK_B"]) * cdiv(classes, matmul["BLOCK_N"])
        programs = min(resident, max(batch * channel_tiles, class_tiles))
        scalars: dict[str, Any] = {"eps": eps, "batch": batch, "channels": channels, "classes": classes, **pool}
        scalars |= {"PRECISION": float32_precision(target), "BLOCK_PARTS": block_of_parts(channel_tiles)}
        return programs, matmul, scalars | constants, {"launch_cooperative_grid": True}

    partial_sq_norms, *converted = plan.scratch(feature_map, pieces)
    local_features = feature_map.new_empty(batch, stripes, channels, dtype=torch.float32)
    revised = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scores, inv_norm = empty_scores(batch, memory, torch.float32)
    plan.launch(
        one_pass_kernel,
        {
            "map": feature_map, "p": p, "local": local_features, "converted": converted[0] if converts else None,
            "local_cast": converted[0] if converts else local_features, "partial_sq_norms": partial_sq_norms,
            "counter": feature_map.new_zeros(1, dtype=torch.int32), "logits": logits, "memory": memory,
            "revised": revised, "scores": scores if scores.shape[2] else None, "inv_norm": inv_norm,
        },
        prepare,
    )  # fmt: skip
    return revised, local_features, scores, inv_norm


def cpu_forward(
    feature_map: Tensor, logits: Tensor, memory: Tensor, p: Tensor | None, eps: float,
    local_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same on the CPU, where one pass has nothing to gain."""
    _, local_features = pool_cpu.stripe_pool(feature_map, memory.shape[0], p, eps)
    revised, scores, inv_norm = cpu.revise_logits(logits, local_features, memory)
    return revised, local_features, scores, inv_norm


@torch.library.custom_op("cge_kernels::revise_logits_one_pass", mutates_args=())
def one_pass_op(
    feature_map: Tensor, logits: Tensor, memory: Tensor, p: Tensor | None, eps: float, local_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = feature_map, logits, memory, p, eps, local_gradient
    return run("revise_logits_one_pass", launch_forward, cpu_forward, *inputs)


@one_pass_op.register_fake
def _(feature_map, logits, memory, p, eps, local_gradient):
    batch, channels = feature_map.shape[:2]
    local_features = feature_map.new_empty(batch, len(memory), channels, dtype=checks.accumulation_dtype(feature_map))
    saved = empty_scores(batch, memory, checks.accumulation_dtype(local_features, memory))
    return torch.empty_like(logits, memory_format=torch.contiguous_format), local_features, *saved


def setup_context(ctx, inputs, output) -> None:
    feature_map, logits, memory, p, ctx.eps, ctx.local_gradient = inputs
    _, local_features, scores, inv_norm = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(feature_map, logits, memory, p, local_features, scores, inv_norm)


def backward(ctx, grad, grad_local, _grad_scores, _grad_scale):
    feature_map, logits, memory, p, local_features, scores, inv_norm = ctx.saved_tensors
    traced = is_traced(grad, grad_local, feature_map)
    revise_backward_, pool_backward_ = (
        (revise_logits_backward_op, stripe_pool_backward_op) if traced else (revise_backward, pool_backward)
    )
    grad_logits, grad_map, grad_p = None, None, None
    if grad is not None:
        grad_logits, grad_revision = revise_backward_(
            grad, logits, local_features, memory, scores, inv_norm, ctx.local_gradient
        )
        if ctx.local_gradient:
            grad_local = grad_revision if grad_local is None else grad_local + grad_revision
    if grad_local is not None and (ctx.needs_input_grad[0] or ctx.needs_input_grad[3]):
        grad_map, grad_p = pool_backward_(None, grad_local, feature_map, None, local_features, p, ctx.eps)
    return grad_map, grad_logits, None, None if p is None else grad_p, None, None


one_pass_op.register_autograd(backward, setup_context=setup_context)
eager_one_pass = autograd_function("ReviseLogitsOnePass", launch_forward, cpu_forward, setup_context, backward)


def check_one_pass(feature_map: Tensor, logits: Tensor, memory: Tensor, p: float | Tensor | None) -> None:
    """Raises as `revise_logits_one_pass` says."""
    checks.require_memory("memory", memory)
    stripes, classes, _ = memory.shape
    check_pooling(feature_map, stripes, p)
    checks.require_tensor("logits", logits, "(B, N)")
    checks.require_same_device(feature_map=feature_map, logits=logits, memory=memory)
    batch, map_channels = feature_map.shape[:2]
    checks.require_shape("memory", memory, (stripes, classes, map_channels), f"feature_map {tuple(feature_map.shape)}")
    checks.require_shape("logits", logits, (batch, classes), f"feature_map and memory {tuple(memory.shape)}")


def revise_logits_one_pass(
    feature_map: Tensor, logits: Tensor, memory: Tensor, p: float | Tensor | None = None, eps: float = 1e-6,
    local_gradient: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Revised logits straight from the feature map, in one launch: stripe_pool with n = memory.shape[0], revise_logits.

    Args:
        feature_map: (B, C, H, W), float16, bfloat16, float32 or, but for Triton, float64; any strides, never copied.
        logits: (B, N), floating.
        memory: (n, N, C), floating, contiguous; only read, and no gradient reaches it.
        p, eps: as in `stripe_pool`.
        local_gradient: as in `revise_logits`.

    Returns:
        revised (B, N) in the dtype of the logits, and local_features (B, n, C) as `stripe_pool` returns them.

    Raises:
        TypeError, ValueError: as `stripe_pool` and `revise_logits`.
    """
    eps = float(eps)
    call = (
        None
        if is_traced(feature_map, logits, memory)
        else Call.of("revise_logits_one_pass", feature_map, logits, memory, p, eps, local_gradient)
    )
    if call is None or not call.is_checked:
        check_one_pass(feature_map, logits, memory, p)
    arguments = feature_map, logits, memory, exponent(p, feature_map), eps, local_gradient
    if runs_on_reference():
        import cge_reference

        return cge_reference.revise_logits_one_pass(*arguments)
    if call is None:
        return one_pass_op(*arguments)[:2]
    call.is_checked = True
    return eager_one_pass(*arguments, call)[:2]

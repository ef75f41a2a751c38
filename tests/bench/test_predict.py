"""Predictions follow from counted bytes, compiled kernels and a GPU's figures by the formulas that are printed."""

from types import SimpleNamespace

import pytest
import torch

from bench import predict
from bench.cases import Case
from bench.count.operations import Operation
from bench.count.traffic import Place, Problem
from bench.measure import apart
from bench.predict import GPUS, Kernel, aten_seconds, times
from bench.shapes import SHAPES
from cge_fast.errors import UserError
from cge_kernels.tools.gpus import HARDWARE

H100 = GPUS["h100"]
US = 1e-6
# 66 programs on 132 multiprocessors: half of them idle
MATMUL = Kernel(
    "revise_kernel", programs=66, occupancy=4, limit="registers", in_flight=30_000, loaded=60_000_000,
    stored=1_000_000, distinct=14_000_000, flops=800_000_000, dtype=torch.bfloat16, special=0,
)  # fmt: skip
POOLING = MATMUL._replace(
    name="stripe_pool_kernel", programs=8192, occupancy=16, limit="warps", in_flight=2048, loaded=50_000_000,
    distinct=51_000_000, flops=0, special=50_000_000,
)  # fmt: skip


def tiny_step() -> dict[Place, tuple[list[Kernel], list[Operation]]]:
    return predict.predict(H100, Problem(SHAPES["tiny"], poolings=("gem",)))


@pytest.mark.slow
def test_tiny_step_by_hand(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operators = {(case.operator, direction): found for (case, direction), found in apart(tiny_step).items()}
    assert {place: [kernel.name for kernel in kernels] for place, (kernels, _) in operators.items()} == {
        ("stripe_pool", "forward"): ["stripe_pool_kernel"],
        ("stripe_pool", "backward"): ["stripe_pool_backward_kernel"],
        ("revised_cross_entropy", "forward"): ["products_kernel", "loss_kernel"],
        ("revised_cross_entropy", "backward"): ["grad_logits_kernel", "normalize_backward_kernel"],
        ("revise_logits", "forward"): ["cast_and_norm_kernel", "revise_kernel"],
        ("revise_logits", "backward"): ["grad_scores_kernel", "grad_local_kernel"],
        ("revise_logits_one_pass", "forward"): ["one_pass_kernel, pooling", "one_pass_kernel, revision"],
        ("revise_logits_one_pass", "backward"): [
            "grad_scores_kernel",
            "grad_local_kernel",
            "stripe_pool_backward_kernel",
        ],
        ("write_memory_", "forward"): ["write_memory_kernel"],
    }
    b, c, height, width, n, k = 4, 8, 6, 2, 3, 5
    pooling, revise = operators["stripe_pool", "forward"][0][0], operators["revise_logits", "forward"][0][1]
    assert pooling.special == 2 * b * c * height * width
    # memory and operand in bfloat16, squares, logits; revised, scores (rows of 16), scale
    loaded, stored = 2 * n * k * c + 2 * b * n * c + 4 * n * b + 4 * b * k, 4 * b * k + 4 * n * b * 16 + 4 * n * b
    assert (revise.loaded, revise.stored, revise.distinct) == (loaded, stored, loaded + stored)
    assert (revise.programs, revise.flops, revise.dtype) == (1, 2 * b * n * k * c, torch.bfloat16)
    assert times(revise, H100)["predicted"] == pytest.approx(2.5 * US + loaded * 370e-9 / revise.in_flight)
    (beside,) = operators["stripe_pool", "backward"][1]
    assert beside.name == "aten.sum"  # of the programs' shares of p's gradient
    assert aten_seconds(beside, H100) == pytest.approx(2.5 * US, rel=1e-3)  # its bytes take next to nothing
    products, loss = operators["revised_cross_entropy", "forward"][0]
    assert products.flops == 2 * b * (n + 1) * k * c
    # memory in bfloat16; classifier and features
    assert products.loaded == 2 * n * k * c + 4 * k * c + 4 * b * (n + 1) * c
    # logits and scores in rows of 16, local features, labels
    assert loss.loaded == 4 * b * (n + 1) * 16 + 4 * b * n * c + 8 * b
    pooled, revised = operators["revise_logits_one_pass", "forward"][0]
    # a program for each sample, whose channels fit in one tile; each loads p
    assert (pooled.programs, pooled.loaded) == (b, 2 * b * c * height * width + 4 * b)
    assert pooled.in_flight == 64 * 64 * 2
    assert (revised.programs, revised.special) == (1, 0)
    # as revise_kernel, and the barrier's counter
    assert (revised.loaded, revised.stored) == (loaded + 4, stored + 4)
    # the classifier in float32 is converted for the gradient of the features
    assert [one.name for one in operators["revised_cross_entropy", "backward"][1]].count("library matmul") == 3


def test_a_matmul_by_hand():
    found = times(MATMUL, H100)
    assert found["memory"] == pytest.approx(14 / 3.35 * US)
    assert found["latency"] == pytest.approx(60e6 * 0.37 / (66 * 30_000) * US)
    assert found["L2"] == pytest.approx(61 / 9.7 / 0.5 * US)
    assert found["math"] == pytest.approx(800 / 989 / 0.5 * US)
    assert found["predicted"] == pytest.approx((2.5 + 61 / 9.7 / 0.5) * US)


def test_pooling_by_hand():
    found = times(POOLING, H100)
    assert found["latency"] == pytest.approx(50e6 * 0.37 / (16 * 132 * 2048) * US)
    assert found["math"] == pytest.approx(50 / (67 / 16) * US)
    assert found["predicted"] == pytest.approx((2.5 + 51 / 3.35) * US)


@pytest.mark.parametrize("kernel", [MATMUL, POOLING], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("figure", ["memory_bandwidth", "tensor_rate", "l2_bandwidth", "special_rate"])
def test_a_faster_gpu_is_never_slower(kernel, figure):
    faster = H100 | {figure: 2 * H100[figure]}
    assert times(kernel, faster)["predicted"] <= times(kernel, H100)["predicted"]


@pytest.mark.parametrize("kernel", [MATMUL, POOLING], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("figure", ["memory_latency", "launch"])
def test_longer_waits_are_never_faster(kernel, figure):
    slower = H100 | {figure: 10 * H100[figure]}
    assert times(kernel, slower)["predicted"] > times(kernel, H100)["predicted"]


def test_what_is_printed(monkeypatch, capsys):
    added = Operation("aten.sum", 0)
    operators = {
        (Case("stripe_pool", "gem"), "forward"): ([POOLING], []),
        (Case("revised_cross_entropy"), "forward"): ([MATMUL], [added]),
        (Case("revise_logits"), "forward"): ([MATMUL], []),  # no part of the head's step
    }
    monkeypatch.setattr(predict, "predict", lambda *_: operators)
    figures = list(predict.measure("h100", "msmt17", "bfloat16"))
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTION for H100 SXM5: nothing was measured")
    assert "predicted = launch + max(memory, latency, L2, math)" in printed
    assert "bench/gpus.toml" in printed
    assert {figure.setting for figure in figures} == {"msmt17, bfloat16, H100 SXM5"}
    values = {(figure.subject, figure.contender): figure.value for figure in figures if figure.bench == "predict"}
    total = times(POOLING, H100)["predicted"] + times(MATMUL, H100)["predicted"] + 2.5 * US
    assert values["head, gem, step", "predicted"] == pytest.approx(total)
    problem = Problem(SHAPES["msmt17"])
    pool, loss, _ = (problem.work_of(case)["forward"] for case, _ in operators)
    floors = max(pool.bytes / 3.35e12, pool.flops / 989e12) + max(loss.bytes / 3.35e12, loss.flops / 989e12)
    assert values["head, gem, step", "floor"] == pytest.approx(floors)
    kernels = [figure for figure in figures if figure.bench == "predicted kernels"]
    assert list(dict.fromkeys(figure.subject for figure in kernels))[:2] == [
        "stripe_pool, gem, forward: stripe_pool_kernel (occupancy by warps)",
        "revised_cross_entropy, forward: revise_kernel (occupancy by registers)",
    ]
    waves = [figure.value for figure in kernels if figure.quantity == "waves"]
    assert waves[:2] == [8192 / (16 * 132), 66 / (4 * 132)]
    assert {figure.quantity for figure in kernels} >= {"programs", "waves", "distinct", "memory", "L2", "predicted"}


def test_a_library_matmul_by_hand():
    matmul = Operation("library matmul", 3_350_000, 989_000_000, torch.bfloat16)
    assert aten_seconds(matmul, H100) == pytest.approx((2.5 + 1) * US)
    many = Operation("library matmul", 3_350_000, 9_890_000_000, torch.bfloat16)
    assert aten_seconds(many, H100) == pytest.approx((2.5 + 10) * US)
    single = Operation("library matmul", 0, 67_000_000, torch.float32)
    assert aten_seconds(single, H100) == pytest.approx((2.5 + 1) * US)


def test_every_gpu_is_one_that_kernels_are_compiled_for():
    assert {gpu["family"] for gpu in GPUS.values()} <= set(HARDWARE)


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(predict, "INTERPRETED", SimpleNamespace(value=True))
    with pytest.raises(UserError, match="TRITON_INTERPRET: must not be set"):
        predict.predict(H100, Problem(SHAPES["tiny"]))


def test_a_gpu_that_triton_cannot_compile_for_is_named(monkeypatch):
    monkeypatch.setattr(predict, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(predict.compiler, "why_not", lambda target: "no linker")
    with pytest.raises(UserError, match="gpu: H100 SXM5 cannot be predicted here: no linker"):
        predict.predict(H100, Problem(SHAPES["tiny"]))

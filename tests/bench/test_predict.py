"""Predictions follow from counted bytes, compiled kernels and a GPU's figures by the formulas that are printed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import predict
from bench.cases import Case
from bench.count.operations import Operation
from bench.count.traffic import Problem
from bench.gpus import GPUS
from bench.measure import apart
from bench.predict import KernelPrediction, OperatorPrediction, aten_us
from bench.shapes import SHAPES
from cge_fast.errors import UserError
from cge_kernels.tools.gpus import HARDWARE

H100 = GPUS["h100"]
# 66 programs on 132 multiprocessors: half of them idle
MATMUL = KernelPrediction(
    kernel="revise_kernel", gpu=H100, programs=66, occupancy=4, limit="registers", in_flight=30_000, loaded=60_000_000,
    stored=1_000_000, distinct=14_000_000, flops=800_000_000, rate=H100.tensor_rate, special=0,
)  # fmt: skip
POOLING = replace(
    MATMUL, kernel="stripe_pool_kernel", programs=8192, occupancy=16, limit="warps", in_flight=2048, loaded=50_000_000,
    distinct=51_000_000, flops=0, special=50_000_000,
)  # fmt: skip


def tiny_step() -> list[OperatorPrediction]:
    return predict.predict(H100, Problem(SHAPES["tiny"]))


@pytest.mark.slow
def test_tiny_step_by_hand(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    predictions = apart(tiny_step)
    operators = {(one.case.operator, one.direction): one for one in predictions}
    assert {place: [kernel.kernel for kernel in one.kernels] for place, one in operators.items()} == {
        ("stripe_pool", "forward"): ["stripe_pool_kernel"],
        ("stripe_pool", "backward"): ["stripe_pool_backward_kernel"],
        ("revised_cross_entropy", "forward"): ["cast_and_norm_kernel", "cross_entropy_kernel", "reduce_tiles_kernel"],
        ("revised_cross_entropy", "backward"): ["grad_logits_kernel", "normalize_backward_kernel"],
        ("revise_logits", "forward"): ["cast_and_norm_kernel", "revise_kernel"],
        ("revise_logits", "backward"): ["grad_scores_kernel", "grad_local_kernel"],
        ("write_memory_", "forward"): ["write_memory_kernel"],
    }
    b, c, height, width, n, k = 4, 8, 6, 2, 3, 5
    pooling, revise = operators["stripe_pool", "forward"].kernels[0], operators["revise_logits", "forward"].kernels[1]
    assert pooling.special == 2 * b * c * height * width
    # memory and operand in bfloat16, squares, logits; revised, scores (rows of 16), scale
    loaded, stored = 2 * n * k * c + 2 * b * n * c + 4 * n * b + 4 * b * k, 4 * b * k + 4 * n * b * 16 + 4 * n * b
    assert (revise.loaded, revise.stored, revise.distinct) == (loaded, stored, loaded + stored)
    assert (revise.programs, revise.flops, revise.rate) == (1, 2 * b * n * k * c, 989e12)
    assert revise.predicted_us == pytest.approx(2.5 + 1e6 * loaded * 370e-9 / revise.in_flight)
    assert (revise.bound_by, revise.waves) == ("launch", 1)
    pool_backward = operators["stripe_pool", "backward"]
    assert pool_backward.aten == ("aten.sum",)  # of the programs' shares of p's gradient
    assert pool_backward.aten_us == pytest.approx(2.5, abs=1e-3)  # its bytes take next to nothing
    loss = operators["revised_cross_entropy", "forward"].kernels[1]
    assert loss.flops == 2 * b * (n + 1) * k * c
    # memory, operands in bfloat16, classifier, squares, labels
    assert loss.loaded == 2 * n * k * c + 2 * b * (n + 1) * c + 4 * k * c + 4 * n * b + 8 * b
    # the classifier in float32 is converted for the gradient of the features
    assert operators["revised_cross_entropy", "backward"].aten.count("library matmul") == 3
    least = 2 * b * c * height * width + 4 * (b * c + b * n * c + 1)
    assert operators["stripe_pool", "forward"].floor_us == pytest.approx(1e6 * least / 3.35e12)


def test_a_matmul_by_hand():
    assert (MATMUL.resident, MATMUL.waves, MATMUL.busy) == (66, 1, 0.5)
    assert MATMUL.tail == 66 / (4 * 132)
    assert MATMUL.memory_us == pytest.approx(14 / 3.35)
    assert MATMUL.latency_us == pytest.approx(60e6 * 0.37 / (66 * 30_000))
    assert MATMUL.l2_us == pytest.approx(61 / 9.7 / 0.5)
    assert MATMUL.math_us == pytest.approx(800 / 989 / 0.5)
    assert MATMUL.predicted_us == pytest.approx(2.5 + 61 / 9.7 / 0.5)
    assert MATMUL.bound_by == "L2"


def test_pooling_by_hand():
    assert (POOLING.resident, POOLING.waves, POOLING.busy) == (2112, 4, 1.0)
    assert POOLING.tail == pytest.approx(8192 / 2112 - 3)
    assert POOLING.math_us == pytest.approx(50 / (67 / 16))
    assert POOLING.predicted_us == pytest.approx(2.5 + 51 / 3.35)
    assert POOLING.bound_by == "memory"


@pytest.mark.parametrize("kernel", [MATMUL, POOLING], ids=lambda kernel: kernel.kernel)
@pytest.mark.parametrize("figure", ["memory_bandwidth", "tensor_rate", "l2_bandwidth", "special_rate"])
def test_a_faster_gpu_is_never_slower(kernel, figure):
    faster = replace(kernel, gpu=replace(H100, **{figure: 2 * getattr(H100, figure)}))
    assert faster.predicted_us <= kernel.predicted_us


@pytest.mark.parametrize("kernel", [MATMUL, POOLING], ids=lambda kernel: kernel.kernel)
@pytest.mark.parametrize("figure", ["memory_latency", "launch"])
def test_longer_waits_are_never_faster(kernel, figure):
    slower = replace(kernel, gpu=replace(H100, **{figure: 10 * getattr(H100, figure)}))
    assert slower.predicted_us > kernel.predicted_us


def test_what_is_printed(monkeypatch, capsys):
    operators = [
        OperatorPrediction(Case("stripe_pool", "gem"), "forward", (POOLING,), (), 0.0, 15.0),
        OperatorPrediction(Case("revised_cross_entropy"), "forward", (MATMUL,), ("aten.sum",), 2.5, 4.0),
        OperatorPrediction(Case("revise_logits"), "forward", (MATMUL,), (), 0.0, 4.0),  # no part of the head's step
    ]
    monkeypatch.setattr(predict, "predict", lambda *_: operators)
    figures = list(predict.measure("h100", "msmt17", "bfloat16", ["gem"], details=True))
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTION for H100 SXM5: nothing was measured")
    assert "bench/gpus.toml" in printed
    assert {figure.setting for figure in figures} == {"msmt17, bfloat16, H100 SXM5"}
    values = {(figure.subject, figure.contender, figure.quantity): figure.value for figure in figures}
    total = POOLING.predicted_us + MATMUL.predicted_us + 2.5
    assert values["head and write, gem", "predicted", "step"] == pytest.approx(total * 1e-6)
    assert values["head and write, gem", "floor", "step"] == pytest.approx(19e-6)
    kernels = [figure for figure in figures if figure.bench == "predicted kernels"]
    assert list(dict.fromkeys((figure.subject, figure.contender) for figure in kernels))[:2] == [
        ("stripe_pool, gem, forward: stripe_pool_kernel", "bound by memory, occupancy by warps"),
        ("revised_cross_entropy, forward: revise_kernel", "bound by L2, occupancy by registers"),
    ]
    assert {figure.quantity for figure in kernels} >= {"programs", "waves", "distinct", "memory", "L2", "predicted"}


def test_a_library_matmul_by_hand():
    matmul = Operation("library matmul", 3_350_000, 989_000_000, torch.bfloat16)
    assert aten_us(matmul, H100) == pytest.approx(2.5 + 1)
    assert aten_us(replace(matmul, flops=9_890_000_000), H100) == pytest.approx(2.5 + 10)
    assert aten_us(replace(matmul, moved=0, flops=67_000_000, dtype=torch.float32), H100) == pytest.approx(2.5 + 1)


def test_every_gpu_is_one_that_kernels_are_compiled_for():
    assert {gpu.family for gpu in GPUS.values()} <= set(HARDWARE)


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(predict, "INTERPRETED", SimpleNamespace(value=True))
    with pytest.raises(UserError, match="TRITON_INTERPRET: must not be set"):
        predict.predict(H100, Problem(SHAPES["tiny"]))


def test_a_gpu_that_triton_cannot_compile_for_is_named(monkeypatch):
    monkeypatch.setattr(predict, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(predict.compiler, "why_not", lambda target: "no linker")
    with pytest.raises(UserError, match="gpu: H100 SXM5 cannot be predicted here: no linker"):
        predict.predict(H100, Problem(SHAPES["tiny"]))

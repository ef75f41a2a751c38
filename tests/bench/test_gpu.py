"""The command for a GPU: without one, all of it runs in the interpreter, and what fails is named and hides nothing."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_parts import FIGURE, broken, fine, hangs_with_another
from support import GPU, KERNEL_DEVICE

import bench.predict
from bench import gpu
from bench.cases import OURS, Case
from bench.count.traffic import Problem
from bench.gpu import checks, speed
from bench.gpu.checks import Expectation
from bench.predict import GPUS, Kernel
from bench.results import Figure
from bench.shapes import SHAPES
from cge_fast.errors import UserError

NEEDED_BY_TRAINING = ("torchvision", "pytorch_metric_learning", "tqdm", "matplotlib", "tensorboard", "safetensors")


@pytest.mark.slow
def test_a_dry_run_tries_everything_without_what_only_trainings_need(tmp_path):
    blocked = f"import sys; sys.modules.update(dict.fromkeys({NEEDED_BY_TRAINING})); "
    code = blocked + "from bench.__main__ import main; main()"
    command = [sys.executable, "-c", code, "gpu", "--dry", "--output", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | gpu.DRY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["dry"]
    assert found["versions"].endswith(f"triton {sys.modules['triton'].__version__}")
    assert all(one["holds"] is not False for one in found["expectations"])
    held = {one["what"].split(",")[0] for one in found["expectations"] if one["holds"]}
    operators = ("stripe_pool", "revise_logits", "revise_logits_one_pass", "revised_cross_entropy", "write_memory_")
    assert held >= {f"parity of {operator}" for operator in operators}
    assert held >= {"the same bits from run to run", "the same bits as a CUDA graph", "no synchronisation in a step"}
    benches = {"host time", "step of the head", "kernels", "step of ResNet-50", "linear cross entropy", "rates"}
    assert {one["bench"] for one in found["figures"]} >= benches
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("# Dry run, without a GPU\n")
    assert "- linear cross entropy" in page  # of packages that are not installed
    assert "| head, gem" in page


def test_what_fails_is_named_and_hides_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"broken": (broken, 9), "fine": (fine, 9)})
    figures = gpu.measure(tmp_path / "new", dry=True)
    assert next(figures) == FIGURE
    with pytest.raises(SystemExit) as exit_:
        next(figures)
    assert exit_.value.code == 1
    what, detail = "broken runs to its end", "RuntimeError: the kernel failed"
    assert f"does not hold: {what}: {detail}\n" in capsys.readouterr().err
    found = json.loads((tmp_path / "new/results.json").read_text())
    assert [one["holds"] for one in found["expectations"]] == [None, False, True]
    assert found["figures"][0]["value"] == 2e-3
    page = (tmp_path / "new/results.md").read_text()
    assert f"## Do not hold: 1 of 3 expectations\n\n- {what}: {detail}\n\n## Skipped: 1 of 3" in page
    assert "- it cannot be tried: no network\n" in page
    assert "| head    | 2 ms |" in page


def test_a_part_that_takes_too_long_is_ended_even_before_it_begins(monkeypatch):
    monkeypatch.setattr(gpu.INTERPRETED, "value", False)  # so that it has a process of its own
    too_long = Expectation("parity runs to its end", False, "it took longer than 0.1 s")
    assert gpu.run("parity", checks.parity, dry=True, seconds=0.1) == [too_long]


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu.INTERPRETED, "value", False)  # so that it has a process of its own
    too_long = Expectation("slow runs to its end", False, "it took longer than 30 s")
    assert gpu.run("slow", hangs_with_another, dry=True, seconds=30) == [FIGURE, too_long]
    with Path("held").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.skipif(GPU, reason="has a GPU")
def test_without_a_gpu_it_says_what_can_be_done(tmp_path):
    with pytest.raises(UserError, match="gpu: PyTorch finds none here; --dry"):
        next(gpu.measure(tmp_path, dry=False))


def test_a_difference_of_bits_is_seen(monkeypatch):
    at, seeds = checks.place(dry=True)._replace(device=torch.device(KERNEL_DEVICE)), iter(range(99))
    monkeypatch.setattr(checks.torch, "manual_seed", lambda _: torch.random.default_generator.manual_seed(next(seeds)))
    differing = next(checks.steps(at))
    assert (differing.what, differing.holds) == ("the same bits from run to run, average", False)
    assert differing.detail.startswith("AssertionError: of loss, gradients and memory those at [0, 1")


def test_ours_must_run_and_others_may_be_missing():
    makers = {OURS: lambda: 1 / 0, "other": lambda: 1 / 0, "third": lambda: lambda: None}
    ours, other, *figures = speed.compare(checks.place(dry=True), ("loss", "tiny", "N 5"), makers, "step")
    assert ours == Expectation(f"loss, tiny, N 5, step, {OURS}", False, "ZeroDivisionError: division by zero")
    assert (other.what, other.holds) == ("loss, tiny, N 5, step, other", None)
    assert {figure.contender for figure in figures} == {"third"}


@pytest.mark.parametrize(("card", "known"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA Unheard Of", False)])
def test_kernels_stand_beside_their_predictions(card, known, monkeypatch):
    kernel = Kernel(
        "stripe_pool_kernel", programs=8192, occupancy=16, limit="warps", in_flight=2048, loaded=50_000_000, stored=0,
        distinct=51_000_000, flops=0, dtype=torch.bfloat16, special=0,
    )  # fmt: skip
    asked = []

    def predict(figures, problem):
        asked.append(figures["family"])
        halves = [kernel._replace(name=f"one_pass_kernel, {part}") for part in ("pooling", "revision")]
        never = kernel._replace(name="never_launched")
        return {(Case("stripe_pool", "gem"), "forward"): ([kernel, never, *halves], [])}

    monkeypatch.setattr(bench.predict, "predict", predict)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    measured = {("stripe_pool, gem", "stripe_pool_kernel"): 60e-6, ("stripe_pool, gem", "one_pass_kernel"): 70e-6}
    found = list(speed.predictions(Problem(SHAPES["tiny"]), measured, empty=4e-6, bandwidth=3e12, flops=1e15))
    figures = {(one.subject.split()[-1], one.contender): one.value for one in found if isinstance(one, Figure)}
    assert asked == ["sm_90"]
    assert figures["stripe_pool_kernel", "of the copy's rate"] == pytest.approx(100 * 51e6 / 60e-6 / 3e12)
    assert figures["one_pass_kernel", "of the copy's rate"] == pytest.approx(100 * 2 * 51e6 / 70e-6 / 3e12)
    whole, *others = (one for one in found if isinstance(one, Expectation))
    if known:
        predicted = bench.predict.times(kernel, GPUS["h100"])["predicted"]
        assert figures["stripe_pool_kernel", "predicted"] == predicted
        assert figures["one_pass_kernel", "predicted"] == 2 * predicted
        assert (whole.holds, whole.detail) == (False, "3.4 times")
        assert whole.what.startswith("stripe_pool, gem: stripe_pool_kernel takes at most 2")
        assert [one.holds for one in others] == [True]
    else:
        assert not any(contender == "predicted" for _, contender in figures)
        assert (whole.holds, whole.detail) == (None, "bench/gpus.toml has no figures of NVIDIA Unheard Of")


def test_the_network_is_the_papers():
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        assert speed.resnet50()(torch.empty(1, 3, 384, 128)).shape == (1, 2048, 24, 8)

"""Where operators run, and what happens without Triton."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from support import draw_sample

import cge_kernels
import cge_reference


def launches_of(call):
    """Names of the kernels that a call launches."""
    names = []
    with cge_kernels.launching(lambda launch: names.append(launch.kernel.fn.__name__)):
        call()
    return names


def pool():
    return cge_kernels.stripe_pool(torch.rand(1, 2, 3, 4), 1)


def test_cpu_tensors_run_on_the_cpu_unless_the_variable_or_the_context_says_otherwise(monkeypatch):
    monkeypatch.delenv("CGE_BACKEND", raising=False)
    assert launches_of(pool) == []
    monkeypatch.setenv("CGE_BACKEND", "triton")  # read at each call
    assert launches_of(pool) == ["stripe_pool_kernel"]
    for name in ("cpu", "reference", "auto"):
        with cge_kernels.backend(name):
            assert launches_of(pool) == []
            with cge_kernels.backend("triton"):
                assert launches_of(pool) == ["stripe_pool_kernel"]
            assert launches_of(pool) == []


def test_the_backend_ends_also_after_an_error(monkeypatch):
    monkeypatch.delenv("CGE_BACKEND", raising=False)
    with pytest.raises(ZeroDivisionError), cge_kernels.backend("triton"):
        _ = 1 / 0
    assert launches_of(pool) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "must be one of auto, triton, cpu, reference, got 'cuda'"),
        ("aten", "'aten' is now called 'cpu'"),
        ("", "must be one of auto, triton, cpu, reference, got ''"),
    ],
)
def test_a_wrong_backend_is_named(monkeypatch, name, message):
    with pytest.raises(ValueError, match=f"^backend:? {message}"), cge_kernels.backend(name):
        pass
    monkeypatch.setenv("CGE_BACKEND", name)
    with pytest.raises(ValueError, match=f"^CGE_BACKEND:? {message}"):
        pool()


def test_the_reference_backend_is_cge_reference_bit_for_bit():
    sample = draw_sample()
    calls = {
        "stripe_pool": (sample.feature_map, 2, 3.0),
        "revise_logits": (sample.logits, sample.local_features, sample.memory),
        "revise_logits_one_pass": (sample.feature_map, sample.logits, sample.memory, 3.0),
        "revised_cross_entropy": sample[2:],
    }
    for name, arguments in calls.items():
        results = []
        for package in (cge_kernels, cge_reference):
            leaves = [
                value.clone().requires_grad_()
                if isinstance(value, torch.Tensor) and value.is_floating_point()
                else value
                for value in arguments
            ]
            with cge_kernels.backend("reference"):
                values = getattr(package, name)(*leaves)
            values = values if isinstance(values, tuple) else (values,)
            sum(value.square().sum() for value in values if value.is_floating_point()).backward()
            gradients = [leaf.grad for leaf in leaves if isinstance(leaf, torch.Tensor)]
            results.append([*values, *(gradient for gradient in gradients if gradient is not None)])
        assert all(ours.equal(plain) for ours, plain in zip(*results, strict=True)), name
    written = cge_reference.write_memory_(sample.memory.clone(), sample.local_features, sample.labels, 0.5)
    with cge_kernels.backend("reference"):
        ours = cge_kernels.write_memory_(sample.memory.clone(), sample.local_features, sample.labels, 0.5)
    assert ours.equal(written)


def run_python(code, **environment):
    """Standard output of a fresh interpreter; cge_kernels is imported anew in it."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def environment():
    """This process's environment without the variables that choose a backend."""
    return {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CGE_BACKEND")}


@pytest.mark.slow
def test_cpu_tensors_on_triton_without_interpreter_or_hook_are_an_error_that_says_what_to_do(environment):
    code = """
        import torch, cge_kernels
        try:
            cge_kernels.stripe_pool(torch.rand(1, 2, 3, 4), 1)
        except RuntimeError as error:
            print(error)
    """
    assert "set TRITON_INTERPRET=1 before importing" in run_python(code, **environment, CGE_BACKEND="triton")


@pytest.mark.slow
def test_without_triton_the_package_runs_on_the_cpu(environment):
    code = """
        import sys
        sys.modules["triton"] = None  # import triton raises ImportError
        import torch, cge_kernels
        feature_map = torch.rand(2, 3, 4, 5, requires_grad=True)
        _, local_features = cge_kernels.stripe_pool(feature_map, 2, 3.0)
        memory = torch.zeros(2, 5, 3)
        cge_kernels.revise_logits(torch.rand(2, 5), local_features, memory).sum().backward()
        cge_kernels.revise_logits_one_pass(feature_map, torch.rand(2, 5), memory)[0].sum().backward()
        features, weight, labels = torch.rand(2, 3, requires_grad=True), torch.rand(5, 3), torch.tensor([1, 2])
        loss, *_ = cge_kernels.revised_cross_entropy(features, weight, local_features.detach(), memory, labels)
        loss.sum().backward()
        cge_kernels.write_memory_(memory, local_features, labels, 0.5)
        print(feature_map.grad.isfinite().all().item(), int(memory.any(dim=2).sum()))
        try:
            with cge_kernels.backend("triton"):
                cge_kernels.stripe_pool(feature_map, 2)
        except RuntimeError as error:
            print(error)
    """
    assert run_python(code, **environment).splitlines() == [
        "True 4",
        "CGE_BACKEND is triton, but Triton is not installed",
    ]

"""Where operators run, and what happens without Triton."""

import subprocess
import sys
import textwrap

import pytest
import torch

import cge_kernels

INTERPRETED = not torch.cuda.is_available()


def launches_of(call):
    """Names of the kernels that a call launches."""
    names = []
    with cge_kernels.launching(lambda launch: names.append(launch.kernel.fn.__name__)):
        call()
    return names


def pool():
    return cge_kernels.stripe_pool(torch.rand(1, 2, 3, 4), 1)


def test_cpu_tensors_run_on_aten_unless_the_variable_or_the_context_says_otherwise(monkeypatch):
    monkeypatch.delenv("CGE_BACKEND", raising=False)
    assert launches_of(pool) == []
    monkeypatch.setenv("CGE_BACKEND", "triton")  # read at each call
    assert launches_of(pool) == ["stripe_pool_kernel"]
    with cge_kernels.backend("cpu"):
        assert launches_of(pool) == []
        with cge_kernels.backend("triton"):
            assert launches_of(pool) == ["stripe_pool_kernel"]
        assert launches_of(pool) == []
    with cge_kernels.backend("auto"):
        assert launches_of(pool) == []


def test_a_wrong_backend_is_named(monkeypatch):
    monkeypatch.setenv("CGE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="CGE_BACKEND must be one of auto, triton, cpu, reference, got 'cuda'"):
        pool()
    with (
        pytest.raises(ValueError, match="backend must be one of auto, triton, cpu, reference, got 'gpu'"),
        cge_kernels.backend("gpu"),
    ):
        pass


def test_float64_has_no_kernel():
    feature_map = torch.rand(1, 2, 3, 4, dtype=torch.float64)
    assert cge_kernels.stripe_pool(feature_map, 1)[0].dtype == torch.float64
    with cge_kernels.backend("triton"), pytest.raises(TypeError, match="kernels know no float64"):
        cge_kernels.stripe_pool(feature_map, 1)


def test_a_wrong_scratch_budget_is_named(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "many")
    with pytest.raises(ValueError, match="CGE_SCRATCH_MB must be a whole number of mebibytes, got 'many'"):
        cge_kernels.revise_logits(torch.rand(1, 2), torch.rand(1, 1, 3), torch.rand(1, 2, 3))


def run_python(code, **environment):
    """Standard output of a fresh interpreter; cge_kernels is imported anew in it."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def environment(monkeypatch):
    """This process's environment without the variables that choose a backend."""
    import os

    return {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CGE_BACKEND")}


def test_cpu_tensors_on_triton_without_interpreter_or_hook_are_an_error_that_says_what_to_do(environment):
    code = """
        import torch, cge_kernels
        try:
            cge_kernels.stripe_pool(torch.rand(1, 2, 3, 4), 1)
        except RuntimeError as error:
            print(error)
    """
    assert "set TRITON_INTERPRET=1 before importing" in run_python(code, **environment, CGE_BACKEND="triton")


def test_without_triton_the_package_runs_on_aten(environment):
    code = """
        import sys
        sys.modules["triton"] = None  # import triton raises ImportError
        import torch, cge_kernels
        feature_map = torch.rand(2, 3, 4, 5, requires_grad=True)
        _, local_features = cge_kernels.stripe_pool(feature_map, 2, 3.0)
        memory = torch.zeros(2, 5, 3)
        cge_kernels.revise_logits(torch.rand(2, 5), local_features, memory).sum().backward()
        cge_kernels.revise_logits_one_pass(feature_map, torch.rand(2, 5), memory)[0].sum().backward()
        cge_kernels.write_memory_(memory, local_features, torch.tensor([1, 2]), 0.5)
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

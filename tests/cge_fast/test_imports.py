"""What is imported only by those who need it, and that no file or function grows too large."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cge_fast

HEAVY = ("triton", "torchvision.models", "tensorboard", "torch.utils.tensorboard", "pytorch_metric_learning")
PACKAGE = Path(cge_fast.__file__).parent


@pytest.mark.parametrize(
    ("module", "not_imported"),
    [("cge_fast.data", HEAVY), ("cge_fast.options", (*HEAVY, "torch")), ("cge_fast.train", (*HEAVY, "torch"))],
)
def test_a_module_imports_nothing_heavy(module, not_imported):
    code = f"import sys, {module}; print(*(name for name in {not_imported!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_package_gives_its_names_when_they_are_asked_for():
    assert {getattr(cge_fast, name).__name__ for name in cge_fast.MODULES} == cge_fast.MODULES.keys()
    with pytest.raises(AttributeError, match="'cge_fast' has no attribute 'Training'"):
        _ = cge_fast.Training


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(file):
    source = file.read_text()
    assert source.count("\n") <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            assert len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) <= 12, node.name


def test_the_list_of_commands_names_programs_that_exist():
    done = subprocess.run([sys.executable, "-m", "cge_fast"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert set(names) == {
        "train", "evaluate", "embed", "search", "export", "report", "compare", "analyze", "data", "experiments"
    }  # fmt: skip
    for name in names:
        assert (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__main__.py").exists()
        assert f"python -m cge_fast.{name} " in done.stdout

"""The wheel and the source distribution hold the tree, and their metadata say what it needs."""

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.util import find_spec
from pathlib import Path

import pytest

import cge_fast

ROOT = Path(__file__).parents[1]
PACKAGES = {"cge_fast": "cge_fast", "kernels/cge_kernels": "cge_kernels", "reference/cge_reference": "cge_reference"}
WITH_SOURCE = ["bench", "docs", "examples", "tests"]
FILES = ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"]

pytestmark = pytest.mark.slow


def files_of(folder: str, name: str) -> set[str]:
    """The files below a folder of the tree, as they are called if the folder is called `name`."""
    files = [file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return {f"{name}/{file.relative_to(ROOT / folder)}" for file in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder of a wheel that was built from a source distribution, and of that."""
    pytest.importorskip("hatchling", reason="the build backend: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def metadata(built) -> Message:
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_three_packages_whole(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == set().union(*(files_of(folder, name) for folder, name in PACKAGES.items()))
    assert {f"{name}/py.typed" for name in PACKAGES.values()} <= held
    assert "cge_fast/experiments/__main__.py" in held  # a folder that a careless .gitignore takes for results


def test_the_source_distribution_holds_the_tree(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in [*PACKAGES, *WITH_SOURCE]:
        assert files_of(folder, folder) <= held
    assert set(FILES) <= held


def test_the_operators_need_torch_alone(metadata):
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert [requirement.partition("<")[0] for requirement in needed] == ["torch"]
    roles = {"train", "analyze", "export", "bench", "test", "dev"}
    assert roles <= set(metadata.get_all("Provides-Extra"))


def test_the_version_is_the_packages(metadata):
    assert metadata["Version"] == cge_fast.__version__


def test_the_readme_of_an_index_points_at_nothing_beside_it(metadata):
    readme = metadata.get_payload()
    assert "Comprehensive Global Embedding" in readme
    assert "![" not in readme
    targets = [link.partition(")")[0] for link in readme.split("](")[1:]]
    assert all(target.startswith("https://") for target in targets)


def test_each_console_script_is_a_program(built):
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
        scripts = [line for line in wheel.read(name).decode().splitlines() if "=" in line]
    assert len(scripts) >= 6
    for script in scripts:
        name, _, target = script.partition(" = ")
        assert target == "cge_fast.commands:main"
        assert find_spec(f"cge_fast.{name.removeprefix('cge-')}")

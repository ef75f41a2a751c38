"""Things are where CONTRIBUTING says, and the rules of the house that can be counted."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ["bench", "cge_fast", "kernels", "reference"]
FILES = sorted(file for folder in [*CODE, "docs", "examples", "tests"] for file in (ROOT / folder).rglob("*.py"))
MOST_LINES, MOST_LINES_OF_CODE, MOST_PARAMETERS = 350, 18_400, 12
FLAT = "jit", "custom_op", "register_fake", "register_kernel"  # decorators of what must have a flat signature
PLACES = re.findall(r"^\| ([^|]+?) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)[1:]


@pytest.mark.parametrize(("what", "where"), PLACES, ids=[what for what, _ in PLACES])
def test_a_thing_is_where_contributing_says(what, where):
    name, file = re.fullmatch(r"(?:`(\w+)` in )?`([^`]+)`(?:, by `.*`)?", where).groups()
    assert (ROOT / file).exists()
    if name:
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", (ROOT / file).read_text(), re.MULTILINE)


def test_the_three_places_are_told():
    told = " ".join(what for what, _ in PLACES)
    assert all(place in told for place in ("the cosine kernel", "the training step", "the memory write"))


def test_an_operator_has_one_folder_and_one_reference():
    kernels, reference = ROOT / "kernels/cge_kernels", ROOT / "reference/cge_reference"
    folders = {file.parent.name for file in kernels.glob("*/op.py")}
    assert folders == {"cross_entropy", "revise_logits", "stripe_pool", "write_memory"}
    assert {"revised_cross_entropy.py", "revise_logits.py", "stripe_pool.py", "write_memory.py"} <= {
        file.name for file in reference.glob("*.py")
    }


def test_no_file_is_long():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > MOST_LINES} == {}


def test_the_code_is_small():
    files = [file for folder in CODE for file in (ROOT / folder).rglob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) <= MOST_LINES_OF_CODE


def test_no_function_has_many_parameters():
    many = []
    for file in FILES:
        for function in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)):
            is_flat = any(word in ast.unparse(decorator) for decorator in function.decorator_list for word in FLAT)
            parameters = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            if len(parameters) > MOST_PARAMETERS and not is_flat:
                many.append(f"{file.relative_to(ROOT)}:{function.lineno} {function.name}")
    assert many == []

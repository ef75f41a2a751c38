"""docs/troubleshooting.md quotes messages as the programs say them."""

import ast
import re

import pytest
from pages import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = [
    message for cell in re.findall(r"^\| (`.+?) \| ", PAGE, re.MULTILINE) for message in re.findall("`(.+?)`", cell)
]
OF_OTHERS = {  # Python's and PyTorch's
    "No module named ...",
    "one of the variables needed for gradient computation has been modified by an inplace operation",
}
SOURCES = [file for folder in ("cge_fast", "kernels") for file in (ROOT / folder).rglob("*.py")]


def texts() -> set[str]:
    """Every text in the code; in those that are filled in, `...` stands for what comes there."""
    found = set()
    for node in (node for file in SOURCES for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.fixture(scope="module")
def said() -> str:
    return "\n".join(texts())


@pytest.mark.parametrize("message", [message for message in QUOTED if message not in OF_OTHERS])
def test_a_message_is_one_that_the_code_says(message, said):
    pattern = r".*".join(re.escape(part) for part in message.split("..."))
    assert re.search(pattern, said), message


def test_messages_are_found():
    assert len(QUOTED) > 30
    assert set(QUOTED) >= OF_OTHERS

"""Options of `pytest bench/`."""

import pytest

from bench.shapes import SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}; default all but tiny")
    group.addoption("--dtype", default="float32", help="of feature map and memory: float32, bfloat16 or float16")
    group.addoption("--rounds", type=int, default=15, help="turns of each contender, at most; default 15")
    group.addoption("--seconds", type=float, default=20.0, help="for each operator and shape, about; default 20")

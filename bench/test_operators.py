"""pytest bench/: how long each operator and the whole head take, forward, backward and as a step, in pytest-benchmark.

The contenders of a group take turns (bench/measure.py), so that whatever else the machine does falls on all of them.
That cannot be done from inside pytest-benchmark, which runs one test's rounds after another; it is given the durations
instead, to show, save and compare (--benchmark-autosave, --benchmark-compare).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import pytest

from bench.cases import CASES, COMPILED, EAGER, OURS, Case, compare
from bench.compiler import missing_compiler
from bench.measure import Times, directions
from bench.shapes import DEFAULT, DTYPES, named
from cge_fast.errors import UserError


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each shape, operator, direction and contender; those that are compared follow one another."""
    option = metafunc.config.getoption
    try:
        shapes = named(option("shapes") or DEFAULT)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    if option("dtype") not in DTYPES:
        raise pytest.UsageError(f"dtype: must be of {', '.join(DTYPES)}, got {option('dtype')!r}")
    tests = [
        pytest.param(shape, case, direction, contender, id=f"{shape}: {case}, {direction}, {contender}")
        for shape in shapes
        for case in CASES
        for direction in directions(case.has_backward)
        for contender in (OURS, EAGER, COMPILED)
    ]
    metafunc.parametrize(("shape", "case", "direction", "contender"), tests)


class Recording:
    """A timer by which one run after another takes as long as was measured."""

    __name__ = "perf_counter or device events"

    def __init__(self, seconds: Sequence[float]):
        self.moments = self.read(seconds)

    def __call__(self) -> float:
        return next(self.moments)

    @staticmethod
    def read(seconds: Sequence[float]) -> Iterator[float]:
        """When each run begins and ends."""
        for duration in seconds:
            yield from (0.0, duration)


@lru_cache(maxsize=1)  # a group's tests follow one another
def measured(shape: str, case: Case, dtype: str, rounds: int, seconds: float) -> dict[str, dict[str, Times]]:
    """Times by contender and direction."""
    return compare(case, named([shape])[shape], DTYPES[dtype], rounds, seconds)


@pytest.fixture
def times(shape: str, case: Case, direction: str, contender: str, request: pytest.FixtureRequest) -> Times:
    """What was measured; the benchmark fixture, which comes after this one, gets it as its timer."""
    if contender == COMPILED and missing_compiler():
        pytest.skip(f"torch.compile cannot run here: {missing_compiler()}")
    option = request.config.getoption
    found = measured(shape, case, option("dtype"), option("rounds"), option("seconds"))[contender][direction]
    group = f"{shape}: {case}, {direction}"
    request.node.add_marker(pytest.mark.benchmark(group=group, timer=Recording(found.seconds.tolist())))
    return found


def test_time(times: Times, benchmark) -> None:
    low, high = times.percentiles
    benchmark.extra_info.update({"20%": low, "80%": high})
    benchmark.pedantic(lambda: None, rounds=len(times.seconds))

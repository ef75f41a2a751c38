"""Contenders take turns, their times are summed up by medians, and their memory is what their tensors hold."""

import os

import pytest
import torch

from bench import measure
from bench.measure import Contender, Instant, apart, extra_bytes, take_turns


def test_contenders_take_turns_and_each_is_first_at_times():
    calls = []
    contenders = {name: Contender(lambda name=name: calls.append(name)) for name in "abc"}
    times = take_turns(contenders, rounds=3)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == measure.WARMUP + 3
    assert rounds[-3:] == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")]
    assert {len(times[name]["forward"]) for name in "abc"} == {3}
    assert times["a"]["forward"] == times["a"]["step"]
    assert set(times["a"]) == {"forward", "step"}


def test_backward_takes_what_forward_returns(monkeypatch):
    moments = iter(range(100))  # forward lasts 1, backward 1
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(moments)))
    taken = []
    found = Contender(lambda: "result", taken.append)()
    assert taken == ["result"]
    assert found == {"forward": 1.0, "backward": 1.0, "step": 2.0}


def test_rounds_end_early_but_not_before_five():
    times = take_turns({"slow": lambda: {"calls": 1.0}}, rounds=100, seconds=0.0)
    assert times == {"slow": {"calls": [1.0] * measure.FEWEST_ROUNDS}}


def test_on_a_gpu_moments_are_events(monkeypatch):
    class Event:
        moments = iter((0.0, 3.0))  # milliseconds

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.moment = next(self.moments)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.moment - self.moment

    monkeypatch.setattr(torch.cuda, "Event", Event)
    start, end = Instant(torch.device("cuda")), Instant(torch.device("cuda"))
    assert end - start == pytest.approx(3e-3)


def test_extra_memory_is_the_most_that_is_held_at_a_time_beyond_the_results():
    source = torch.ones(1000)

    def forward():
        first = source + source  # 4,000 bytes
        second = first.double()  # and 8,000
        del first
        return second + second  # and 8,000, less 4,000

    assert extra_bytes(Contender(forward)) == 8_000


@pytest.mark.slow
def test_a_process_apart_has_its_own_environment():
    assert apart(os.getenv, "CGE_TEST", CGE_TEST="1") == "1"
    assert "CGE_TEST" not in os.environ

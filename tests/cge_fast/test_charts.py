"""Curves and areas."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cge_fast.charts import HEIGHT, WIDTH, Series, chart, ticks

VALUES = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(low=VALUES, span=st.floats(0, 1e6), count=st.integers(2, 8), whole=st.booleans())
def test_ticks_are_few_round_and_around_the_values(low, span, count, whole):
    high = low + span
    found = ticks(low, high, count, whole)
    slack = 1e-6 * max(abs(low), abs(high), found[1] - found[0])
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 2 * count + 2
    step = found[1] - found[0]
    assert not whole or math.isclose(step, round(step))


@given(st.lists(st.tuples(st.integers(0, 500), VALUES), min_size=1, max_size=40, unique_by=lambda point: point[0]))
def test_all_points_are_inside_the_picture(points):
    drawn = chart("loss", [Series("a", sorted(points))])
    (corners,) = re.findall(r'<polyline class="c0" points="([^"]*)"><title>', drawn)
    places = [tuple(map(float, corner.split(","))) for corner in corners.split()]
    assert len(places) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert [x for x, _ in places] == sorted(x for x, _ in places)


def test_higher_values_are_higher_up():
    (corners,) = re.findall(r'points="([^"]*)"><title>', chart("loss", [Series("a", [(1, 2.0), (2, 1.0), (3, 3.0)])]))
    heights = [float(corner.split(",")[1]) for corner in corners.split()]
    assert heights[2] < heights[0] < heights[1]


def test_areas_lie_one_above_the_other_and_fill_the_chart():
    shares = [Series("right", [(1, 0.25), (2, 0.5)]), Series("wrong", [(1, 0.75), (2, 0.5)])]
    areas = re.findall(r'<polygon [^>]*points="([^"]*)"', chart("levels", shares, percent=True, stacked=True))
    lower, upper = ([corner.split(",") for corner in area.split()] for area in areas)
    assert lower[2:] == upper[:2][::-1]
    assert {y for _, y in upper[2:]} == {"8.0"}


@pytest.mark.parametrize(("percent", "last"), [(True, "12.5%"), (False, "0.125")])
def test_the_key_names_the_last_value_and_names_are_no_markup(percent, last):
    drawn = chart("<i>", [Series("a<b>", [(1, 0.5), (2, 0.125)])], percent)
    assert f"a&lt;b&gt; <b>{last}</b>" in drawn
    assert "<figcaption>&lt;i&gt;</figcaption>" in drawn


def test_the_axis_of_values_that_do_not_change_begins_at_0():
    drawn = chart("accuracy", [Series("a", [(1, 1.0), (2, 1.0)])], percent=True)
    assert re.findall(r'text-anchor="end">([^<]*)<', drawn) == ["0%", "20%", "40%", "60%", "80%", "100%"]

"""Compulsory bytes and FLOPs are those that one counts by hand at a tiny shape."""

import pytest

from bench.shapes import Shape
from bench.work import Work, work

# B 4, C 3, map 5x2, n 2, N 7: 120 numbers in the map, 12 global and 24 local features, 28 logits, 42 in the memory
SHAPE = Shape(batch=4, channels=3, height=5, width=2, stripes=2, classes=7)


@pytest.mark.parametrize(
    ("operator", "pooling", "direction", "expected"),
    [
        ("stripe_pool", "average", "forward", Work(4 * (120 + 12 + 24), 120)),
        ("stripe_pool", "average", "backward", Work(4 * (120 + 12 + 24), 120)),
        ("stripe_pool", "gem", "backward", Work(4 * (2 * 120 + 2 * 36 + 1), 120)),
        # 2 * B * n * N * C
        ("revise_logits", "average", "forward", Work(4 * (42 + 24 + 2 * 28), 2 * 4 * 2 * 7 * 3)),
        ("revise_logits", "average", "backward", Work(4 * (42 + 2 * 24 + 3 * 28), 336)),
        ("revise_logits_one_pass", "gem", "forward", Work(4 * (120 + 1 + 42 + 24 + 2 * 28), 120 + 336)),
        # 21 numbers in the classifier; labels of 8 bytes, hits of 1
        ("revised_cross_entropy", "average", "forward", Work(4 * (12 + 21 + 24 + 42 + 4) + 32 + 12, 336 + 168)),
        ("revised_cross_entropy", "average", "backward", Work(4 * (4 + 2 * (12 + 21 + 24) + 42) + 32, 336 + 336)),
        # 4 samples are one identity: 2 rows of 3
        ("write_memory_", "average", "forward", Work(2 * 3 * 8 + 4 * 24 + 32 + 4, 3 * 24)),
    ],
)
def test_work_by_hand(operator, pooling, direction, expected):
    assert work(operator, SHAPE, pooling)[direction] == expected


def test_half_precision_halves_map_and_memory():
    assert work("stripe_pool", SHAPE, itemsize=2)["forward"].bytes == 2 * 120 + 4 * 36
    assert work("revise_logits", SHAPE, itemsize=2)["forward"].bytes == 2 * 42 + 4 * (24 + 56)
    assert work("write_memory_", SHAPE, itemsize=2)["forward"].bytes == 2 * 3 * 10 + 4 * 24 + 36


def test_the_head_is_the_sum_of_its_operators():
    parts = [work(operator, SHAPE) for operator in ("stripe_pool", "revised_cross_entropy", "write_memory_")]
    assert work("head", SHAPE)["forward"] == parts[0]["forward"] + parts[1]["forward"]
    assert work("head", SHAPE)["step"] == parts[0]["step"] + parts[1]["step"] + parts[2]["step"]


def test_a_step_is_both_directions():
    parts = work("revise_logits", SHAPE)
    assert parts["step"] == parts["forward"] + parts["backward"]
    write = work("write_memory_", SHAPE)
    assert write == {"forward": write["step"], "step": write["step"]}


def test_an_unknown_operator_is_named():
    with pytest.raises(ValueError, match="got 'convolve'"):
        work("convolve", SHAPE)

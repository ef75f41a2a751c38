"""Counted bytes are those that one gets by hand from shapes, labels and tiles."""

from dataclasses import replace
from functools import cache

import pytest

from bench import count
from bench.cases import EAGER, OURS, Case
from bench.count import traffic
from bench.count.traffic import Problem, Traffic
from bench.shapes import Shape
from cge_kernels.tools.gpus import HARDWARE

H100 = HARDWARE["sm_90"].target


@cache
def rows_of(problem: Problem) -> list[Traffic]:
    return traffic.interpreted(traffic.count_traffic, problem, H100)


@cache
def counted(problem: Problem) -> tuple[dict[tuple[str, str], Traffic], dict[tuple[str, str], int]]:
    """What was counted by kernel and tensor (of a kernel that two operators launch: the latter's), and bytes by
    operator and contender."""
    found = rows_of(problem)
    moved = count.moved_bytes(problem, found)
    by_operator = {(subject, contender): value for subject, one in moved.items() for contender, value in one.items()}
    return {(one.kernel, one.tensor): one for one in found if one.distinct}, by_operator


def loaded(one: Traffic) -> tuple[int, int]:
    return one.loaded, one.distinct_loaded


def stored(one: Traffic) -> tuple[int, int]:
    return one.stored, one.distinct_stored


def test_average_pooling_by_hand():
    shape = Shape(batch=2, channels=3, height=4, width=5, stripes=2, classes=2)
    by_tensor, by_operator = counted(Problem(shape, "float32", ("average",)))
    forward, backward = "stripe_pool_kernel", "stripe_pool_backward_kernel"
    feature_map, global_feature, local = 2 * 3 * 4 * 5 * 4, 2 * 3 * 4, 2 * 2 * 3 * 4
    assert loaded(by_tensor[forward, "map"]) == (feature_map, feature_map)
    assert stored(by_tensor[forward, "global"]) == (global_feature, global_feature)
    assert stored(by_tensor[forward, "local"]) == (local, local)
    assert stored(by_tensor[backward, "grad_map"]) == (feature_map, feature_map)
    assert (backward, "map") not in by_tensor
    # the gradients of stripes 0, 1 and, as the one that follows the last, 1 again
    assert loaded(by_tensor[backward, "grad_local"]) == (local * 3 // 2, local)
    for contender in ("at least", "distinct"):
        assert by_operator["stripe_pool, average, forward", contender] == feature_map + global_feature + local


# 20 classes in tiles of 16, 8 samples in one tile, 2 identities of 4 samples; the stripes share a row
SMALL = Problem(Shape(batch=8, channels=20, height=5, width=3, stripes=2, classes=20), "bfloat16", ("gem",))


def test_revision_and_write_by_hand():
    by_tensor, by_operator = counted(SMALL)
    b, c, n, k = 8, 20, 2, 20
    memory, scores, local = n * k * c * 2, n * b * 32 * 4, b * n * c * 4
    assert loaded(by_tensor["revise_kernel", "memory"]) == (memory, memory)
    assert loaded(by_tensor["revise_kernel", "local_cast"]) == (2 * b * n * c * 2, b * n * c * 2)
    assert stored(by_tensor["revise_kernel", "scores"]) == (scores, scores)
    assert stored(by_tensor["revise_kernel", "inv_norm"]) == (n * b * 4, n * b * 4)
    assert loaded(by_tensor["grad_scores_kernel", "scores"]) == (2 * scores, scores)
    assert stored(by_tensor["grad_local_kernel", "grad_local"]) == (local, local)
    # the loss reads memory and classifier once, and keeps logits and scores of 20 classes, padded to 32, x 8 samples
    logits = (n + 1) * 32 * b * 4
    assert loaded(by_tensor["products_kernel", "memory"]) == (memory, memory)
    assert loaded(by_tensor["products_kernel", "weight"]) == (k * c * 4, k * c * 4)
    assert stored(by_tensor["products_kernel", "products"]) == loaded(by_tensor["loss_kernel", "products"])
    assert stored(by_tensor["loss_kernel", "saved_logits"]) == (logits, logits)
    assert stored(by_tensor["loss_kernel", "loss"]) == (b * 4, b * 4)
    assert stored(by_tensor["grad_logits_kernel", "grad_logits"]) == (logits // 2, logits // 2)
    assert stored(by_tensor["normalize_backward_kernel", "grad_local"]) == (local, local)
    rows = 2 * n * c
    assert loaded(by_tensor["write_memory_kernel", "memory"]) == (rows * 4, rows * 4)
    assert stored(by_tensor["write_memory_kernel", "memory"]) == (rows * 4, rows * 4)
    assert stored(by_tensor["write_memory_kernel", "low_precision_memory"]) == (rows * 2, rows * 2)
    assert loaded(by_tensor["write_memory_kernel", "local"]) == (local, local)
    # of the loss two kernels read the local features; the library's matmuls, which are not counted here, do the rest
    loss = "revised_cross_entropy, forward"
    assert by_operator[loss, "distinct"] - by_operator[loss, "at least"] == local
    backward = {"revised_cross_entropy, backward", "revise_logits_one_pass, gem, backward"}  # of several parts
    others = {subject for subject, _ in by_operator} - {loss, *backward, "head, gem, step"}
    assert len(others) == 6
    assert all(by_operator[subject, "distinct"] == by_operator[subject, "at least"] for subject in others)


def streamed() -> list[Traffic]:
    """Of the loss on a GPU whose one multiprocessor is not worth splitting it."""
    case = Case("revised_cross_entropy")
    launches, _ = traffic.watch([case], OURS, SMALL, replace(H100, multiprocessors=1))[case, "forward"]
    return [one for launch in launches for one in traffic.run_counted(str(case), 0, launch, 1)]


def test_a_loss_that_streams_over_the_classes_by_hand():
    by_tensor = {(one.kernel, one.tensor): one for one in traffic.interpreted(streamed) if one.distinct}
    b, c, n, k = 8, 20, 2, 20
    assert loaded(by_tensor["cross_entropy_kernel", "memory"]) == (n * k * c * 2,) * 2
    assert loaded(by_tensor["cross_entropy_kernel", "weight"]) == (k * c * 4,) * 2
    assert stored(by_tensor["cross_entropy_kernel", "saved_logits"]) == ((n + 1) * k * 16 * 4,) * 2  # rows of 16
    assert stored(by_tensor["cross_entropy_kernel", "sums"]) == (2 * b * 4,) * 2
    assert stored(by_tensor["reduce_tiles_kernel", "loss"]) == (b * 4,) * 2


def test_the_step_is_the_sum_of_its_operators():
    _, by_operator = counted(SMALL)
    operators = ("stripe_pool, gem", "revised_cross_entropy", "write_memory_")
    for contender in ("at least", "distinct", "scratch and matmuls", OURS, EAGER):
        parts = [
            by_operator.get((f"{operator}, {direction}", contender), 0)
            for operator in operators
            for direction in ("forward", "backward")
        ]
        assert by_operator["head, gem, step", contender] == sum(parts)
    assert by_operator["head, gem, step", OURS] == (
        by_operator["head, gem, step", "distinct"] + by_operator["head, gem, step", "scratch and matmuls"]
    )


@pytest.mark.slow
def test_pooling_of_one_sample_stands_for_all():
    whole = Problem(SMALL.shape, SMALL.dtype, SMALL.poolings, pool_samples=8)
    assert counted(whole) == counted(SMALL)


def test_launches_are_numbered():
    rows = rows_of(SMALL)
    assert list(dict.fromkeys((row.launch, row.operator, row.kernel) for row in rows)) == [
        (0, "stripe_pool, gem, forward", "stripe_pool_kernel"),
        (1, "stripe_pool, gem, backward", "stripe_pool_backward_kernel"),
        (2, "revised_cross_entropy, forward", "products_kernel"),
        (3, "revised_cross_entropy, forward", "loss_kernel"),
        (4, "revised_cross_entropy, backward", "grad_logits_kernel"),
        (5, "revised_cross_entropy, backward", "normalize_backward_kernel"),
        (6, "revise_logits, forward", "cast_and_norm_kernel"),
        (7, "revise_logits, forward", "revise_kernel"),
        (8, "revise_logits, backward", "grad_scores_kernel"),
        (9, "revise_logits, backward", "grad_local_kernel"),
        (10, "revise_logits_one_pass, gem, forward", "one_pass_kernel"),
        (11, "revise_logits_one_pass, gem, backward", "grad_scores_kernel"),
        (12, "revise_logits_one_pass, gem, backward", "grad_local_kernel"),
        (13, "revise_logits_one_pass, gem, backward", "stripe_pool_backward_kernel"),
        (14, "write_memory_, forward", "write_memory_kernel"),
    ]
    written = next(row for row in rows if (row.launch, row.tensor) == (14, "memory"))
    bytes_of_rows = 2 * 2 * 20 * 4  # 2 identities in 2 stripes, 20 channels
    assert (*loaded(written), *stored(written)) == (bytes_of_rows,) * 4


def test_with_both_poolings_each_step_has_its_own():
    both = Problem(SMALL.shape, SMALL.dtype, ("average", "gem"))
    assert [str(case) for case in both.cases][:2] == ["stripe_pool, average", "stripe_pool, gem"]
    values = {(case, "forward"): {str(case): 1.0} for case in both.cases}
    for pooling in both.poolings:
        step = traffic.by_subject(values, both.poolings)[f"head, {pooling}, step"]
        assert step == {f"stripe_pool, {pooling}": 1, "revised_cross_entropy": 1, "write_memory_": 1}


@pytest.mark.slow
def test_where_kernels_are_compiled_a_process_of_its_own_interprets_them(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(traffic.INTERPRETED, "value", False)
    assert traffic.interpreted(is_interpreted) is True


def is_interpreted() -> bool:
    return traffic.INTERPRETED.value

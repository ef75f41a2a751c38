"""Counted bytes are those that one gets by hand from shapes, labels and tiles."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from jsonargparse import ArgumentError

from bench import traffic
from cge_fast.errors import UserError

ROOT = Path(__file__).parents[2]


@cache
def tables(*arguments: str) -> tuple[dict[tuple[str, str], list[str]], dict[str, list[str]]]:
    """Cells of both tables: by kernel and tensor, and by operator.

    The program runs in a process of its own, since Triton chooses its interpreter at import.
    """
    command = [sys.executable, "-m", "bench.traffic", "--markdown", *arguments]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [
        [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    return {(row[1], row[2]): row[3:] for row in rows if len(row) == 10}, {
        row[0]: row[1:] for row in rows if len(row) == 7
    }


def loaded(row: list[str]) -> tuple[int, int]:
    return int(row[0]), int(row[1])


def stored(row: list[str]) -> tuple[int, int]:
    return int(row[3]), int(row[4])


def test_average_pooling_by_hand():
    by_tensor, by_operator = tables(
        *("--batch", "2", "--channels", "3", "--height", "4", "--width", "5", "--stripes", "2", "--classes", "2"),
        *("--dtype", "float32", "--pooling", "average", "--channels_last", "true"),
    )
    forward, backward = "stripe_pool_kernel", "stripe_pool_backward_kernel"
    feature_map, global_feature, local = 2 * 3 * 4 * 5 * 4, 2 * 3 * 4, 2 * 2 * 3 * 4
    assert loaded(by_tensor[forward, "map"]) == (feature_map, feature_map)
    assert stored(by_tensor[forward, "global"]) == (global_feature, global_feature)
    assert stored(by_tensor[forward, "local"]) == (local, local)
    assert stored(by_tensor[backward, "grad_map"]) == (feature_map, feature_map)
    assert (backward, "map") not in by_tensor
    # the gradients of stripes 0, 1 and, as the one that follows the last, 1 again
    assert loaded(by_tensor[backward, "grad_local"]) == (local * 3 // 2, local)
    assert by_operator["pool forward"][:3] == [str(feature_map + global_feature + local)] * 2 + ["1.000"]


# 20 classes in tiles of 16, 8 samples in one tile, 2 identities of 4 samples; the stripes share a row
SMALL = (
    *("--batch", "8", "--channels", "20", "--height", "5", "--width", "3", "--stripes", "2", "--classes", "20"),
    *("--dtype", "bfloat16", "--pooling", "gem"),
)


def test_revision_and_write_by_hand():
    by_tensor, by_operator = tables(*SMALL)
    b, c, n, k = 8, 20, 2, 20
    memory, scores, local = n * k * c * 2, n * b * 32 * 4, b * n * c * 4
    assert loaded(by_tensor["revise_kernel", "memory"]) == (memory, memory)
    assert loaded(by_tensor["revise_kernel", "operand (scratch)"]) == (2 * b * n * c * 2, b * n * c * 2)
    assert stored(by_tensor["revise_kernel", "scores (scratch)"]) == (scores, scores)
    assert stored(by_tensor["revise_kernel", "scale (scratch)"]) == (n * b * 4, n * b * 4)
    assert loaded(by_tensor["grad_scores_kernel", "scores (scratch)"]) == (2 * scores, scores)
    assert stored(by_tensor["grad_local_kernel", "grad_local"]) == (local, local)
    # the loss reads memory and classifier once, and keeps logits and scores of 20 classes x 8 samples in rows of 16
    assert loaded(by_tensor["cross_entropy_kernel", "memory"]) == (memory, memory)
    assert loaded(by_tensor["cross_entropy_kernel", "weight"]) == (k * c * 4, k * c * 4)
    assert stored(by_tensor["cross_entropy_kernel", "kept (scratch)"]) == ((n + 1) * k * 16 * 4,) * 2
    assert stored(by_tensor["cross_entropy_kernel", "sums (scratch)"]) == (2 * 2 * b * 4,) * 2
    assert stored(by_tensor["combine_kernel", "loss"]) == (b * 4, b * 4)
    assert stored(by_tensor["grad_logits_kernel", "gradients (scratch)"]) == ((n + 1) * k * b * 2,) * 2
    assert stored(by_tensor["project_kernel", "grad_local"]) == (local, local)
    rows = 2 * n * c
    assert loaded(by_tensor["write_memory_kernel", "memory"]) == (rows * 4, rows * 4)
    assert stored(by_tensor["write_memory_kernel", "memory"]) == (rows * 4, rows * 4)
    assert stored(by_tensor["write_memory_kernel", "shadow"]) == (rows * 2, rows * 2)
    assert loaded(by_tensor["write_memory_kernel", "local"]) == (local, local)
    # of the loss two kernels read the labels, and the library's matmuls, which are not counted here, do the rest
    least, distinct, *_ = by_operator["loss forward"]
    assert int(distinct) - int(least) == b * 8
    other = {"operator", "loss forward", "loss backward", "step"}
    assert {row[2] for name, row in by_operator.items() if name not in other} == {"1.000"}


def test_pooling_of_one_sample_stands_for_all():
    one, whole = tables(*SMALL), tables(*SMALL, "--pool_samples", "8")
    assert one[1] == whole[1]
    assert {key: row[:6] for key, row in one[0].items()} == {key: row[:6] for key, row in whole[0].items()}
    assert one[0]["stripe_pool_kernel", "map"][6] == "1/8"
    assert {row[6] for row in whole[0].values()} == {"all", "run"}


def test_json_by_launch():
    command = [sys.executable, "-m", "bench.traffic", "--json", "--target", "sm_80", *SMALL]
    rows = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert list(dict.fromkeys((row["launch"], row["operator"], row["kernel"]) for row in rows)) == [
        (0, "pool forward", "stripe_pool_kernel"),
        (1, "pool backward", "stripe_pool_backward_kernel"),
        (2, "loss forward", "prepare_kernel"),
        (3, "loss forward", "cross_entropy_kernel"),
        (4, "loss forward", "combine_kernel"),
        (5, "loss backward", "grad_logits_kernel"),
        (6, "loss backward", "project_kernel"),
        (7, "revise forward", "prepare_kernel"),
        (8, "revise forward", "revise_kernel"),
        (9, "revise backward", "grad_scores_kernel"),
        (10, "revise backward", "grad_local_kernel"),
        (11, "memory write", "write_memory_kernel"),
    ]
    written = next(row for row in rows if (row["launch"], row["tensor"]) == (11, "memory"))
    bytes_of_rows = 2 * 2 * 20 * 4  # 2 identities in 2 stripes, 20 channels
    names = ("loaded", "distinct_loaded", "stored", "distinct_stored")
    assert [written[name] for name in names] == [bytes_of_rows] * 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stripes", "25"], "stripes: must be at most the height 24, got 25"),
        (["--pool_samples", "3"], "pool_samples: must divide the batch 64, got 3"),
        (["--batch", "0"], "batch"),
        (["--dtype", "float64"], "dtype"),
        (["--target", "sm_70"], "target"),
    ],
)
def test_wrong_options(arguments, named):
    with pytest.raises((UserError, ArgumentError), match=named):
        traffic.main(arguments)

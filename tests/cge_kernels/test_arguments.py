"""Wrong arguments: one line that names the argument, what came and what is wanted, before anything is launched."""

import pytest
import torch
from support import draw_sample

import cge_kernels
from cge_kernels import ClassShard

B, n, N, C, H, W = 3, 2, 7, 5, 6, 2
SAMPLE = draw_sample(B, n, N, C, H, W)
NAMES = {
    "stripe_pool": ("feature_map",),
    "revise_logits": ("logits", "local_features", "memory"),
    "revise_logits_one_pass": ("feature_map", "logits", "memory"),
    "revised_cross_entropy": ("features", "weight", "local_features", "memory", "labels"),
    "write_memory_": ("memory", "local_features", "labels"),
    "stripe_correct": ("local_features", "memory", "labels"),
}
OTHERS = {"stripe_pool": {"stripes": 2}, "write_memory_": {"momentum": 0.5}}
STRIDED = torch.zeros(n, C, N).transpose(1, 2)
ON_META = torch.zeros(n, N, C, device="meta")
LOSS, WRITE, CORRECT = "revised_cross_entropy", "write_memory_", "stripe_correct"
REVISE, ONE_PASS, POOL = "revise_logits", "revise_logits_one_pass", "stripe_pool"

WRONG = [
    (POOL, {"feature_map": [1.0]}, TypeError, r"feature_map must be a tensor of shape \(B, C, H, W\), got list"),
    (POOL, {"feature_map": torch.zeros(2, 3, 4)}, ValueError, r"feature_map must have shape \(B, C, H, W\), got \(2,"),
    (POOL, {"feature_map": torch.zeros(1, 1, 2, 2).int()}, TypeError, "floating dtype, got torch.int32"),
    (POOL, {"feature_map": torch.zeros(1, 1, 2, 0)}, ValueError, "feature_map must have no empty dimension but B"),
    (POOL, {"stripes": H + 1}, ValueError, f"stripes must lie between 1 and the feature map's height {H}, got {H + 1}"),
    (POOL, {"stripes": 0}, ValueError, "stripes must lie between 1 and"),
    (POOL, {"p": torch.ones(2)}, ValueError, r"p must be a number or a 0-d tensor, got shape \(2,\)"),
    (REVISE, {"logits": torch.zeros(B, N + 1)}, ValueError, r"logits must have shape \(3, 7\) to fit .* got \(3, 8\)"),
    (REVISE, {"logits": torch.zeros(B, N).long()}, TypeError, "logits must have a floating dtype, got torch.int64"),
    (
        REVISE,
        {"local_features": torch.zeros(B, n, 9)},
        ValueError,
        r"memory must have shape \(2, 7, 9\) to fit local_f",
    ),
    (REVISE, {"local_features": torch.zeros(B, C)}, ValueError, r"local_features must have shape \(B, n, C\), got \(3"),
    (REVISE, {"memory": torch.zeros(N, C)}, ValueError, r"memory must have shape \(n, N, C\), got \(7, 5\)"),
    (REVISE, {"memory": torch.zeros(4, N, C)}, ValueError, r"memory must have shape \(2, 7, 5\) to fit local_features"),
    (REVISE, {"memory": STRIDED}, ValueError, r"memory must be contiguous, got strides \(35, 1, 7\) for shape"),
    (REVISE, {"memory": torch.zeros(n, 0, C)}, ValueError, "memory must have no empty dimension"),
    (REVISE, {"memory": ON_META}, ValueError, "tensors must lie on one device, got .* memory on meta"),
    (ONE_PASS, {"memory": torch.zeros(n, N, 4)}, ValueError, r"memory must have shape \(2, 7, 5\) to fit feature_map"),
    (ONE_PASS, {"logits": torch.zeros(2, N)}, ValueError, r"logits must have shape \(3, 7\) to fit"),
    (
        ONE_PASS,
        {"feature_map": torch.zeros(B, C, 1, 2)},
        ValueError,
        "stripes must lie between 1 and .* 1, got 2",
    ),
    (ONE_PASS, {"memory": STRIDED}, ValueError, "memory must be contiguous"),
    (ONE_PASS, {"memory": ON_META}, ValueError, "one device, got .* memory on meta"),
    (LOSS, {"features": torch.zeros(2, C)}, ValueError, r"features must have shape \(3, 5\) to fit local_features"),
    (LOSS, {"weight": torch.zeros(4, C)}, ValueError, r"weight must have shape \(7, 5\) to fit memory and features"),
    (LOSS, {"memory": torch.zeros(1, N, C)}, ValueError, r"memory must have shape \(2, 7, 5\) to fit local_features"),
    (LOSS, {"memory": STRIDED}, ValueError, "memory must be contiguous"),
    (LOSS, {"memory": ON_META}, ValueError, "one device, got .* memory on meta"),
    (LOSS, {"labels": torch.zeros(B)}, TypeError, "labels must have an integer dtype, got torch.float32"),
    (LOSS, {"labels": torch.zeros(2).long()}, ValueError, r"labels must have shape \(3,\) to fit"),
    (LOSS, {"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    (LOSS, {"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(7,\) to fit weight, got \(4,\)"),
    (LOSS, {"shard": ClassShard(0, 4, 9)}, ValueError, "memory must have the shard's 4 classes, got 7"),
    (LOSS, {"shard": ClassShard(0, N, 9)}, ValueError, "shard"),  # no process group, or no sharding in the reference
    (WRITE, {"memory": torch.zeros(n, N, C).bfloat16()}, TypeError, "memory must be float32 or float64"),
    (WRITE, {"memory": STRIDED}, ValueError, "memory must be contiguous, got strides"),
    (WRITE, {"memory": ON_META}, ValueError, "one device, got memory on meta"),
    (WRITE, {"local_features": torch.zeros(B, 1, C)}, ValueError, r"local_features must have shape \(3, 2, 5\) to fit"),
    (WRITE, {"labels": torch.zeros(B)}, TypeError, "labels must have an integer dtype"),
    (WRITE, {"labels": torch.zeros(2).long()}, ValueError, r"labels must have shape \(3,\) to fit local_features"),
    (WRITE, {"momentum": 1.5}, ValueError, r"momentum must lie in \[0, 1\], got 1.5"),
    (WRITE, {"momentum": torch.tensor(1.5)}, ValueError, r"momentum must lie in \[0, 1\], got 1.5"),
    (WRITE, {"low_precision_memory": torch.zeros(n, 2, C)}, ValueError, "low_precision_memory must have shape"),
    (WRITE, {"low_precision_memory": STRIDED}, ValueError, "low_precision_memory must be contiguous"),
    (WRITE, {"shard": ClassShard(0, 4, 9)}, ValueError, "memory must have the shard's 4 classes, got 7"),
    (WRITE, {"shard": ClassShard(0, N, 9)}, ValueError, "shard"),
    (CORRECT, {"labels": torch.zeros(B)}, TypeError, "labels must have an integer dtype"),
    (CORRECT, {"labels": torch.zeros(2).long()}, ValueError, r"labels must have shape \(3,\) to fit local_features"),
    (CORRECT, {"memory": STRIDED}, ValueError, "memory must be contiguous"),
    *(
        (operator, {"labels": torch.tensor([1, wrong, 2])}, ValueError, rf"labels must lie in \[0, 7\), got {wrong}")
        for operator in (LOSS, WRITE)
        for wrong in (-1, N, 2**40)
    ),
]


@pytest.mark.parametrize(
    ("operator", "change", "error", "message"), WRONG, ids=[f"{case[0]}-{next(iter(case[1]))}" for case in WRONG]
)
def test_wrong_arguments_are_named_before_any_launch(operator, change, error, message, any_backend):
    arguments = {name: getattr(SAMPLE, name).cpu() for name in NAMES[operator]} | OTHERS.get(operator, {})
    before = SAMPLE.memory.clone()
    launches = []
    with cge_kernels.launching(launches.append), pytest.raises(error, match=message) as raised:
        getattr(cge_kernels, operator)(**arguments | change)
    assert "\n" not in str(raised.value)
    assert not launches
    assert SAMPLE.memory.equal(before)


def test_float64_has_no_kernel():
    feature_map = torch.rand(1, 2, 3, 4, dtype=torch.float64)
    assert cge_kernels.stripe_pool(feature_map, 1)[0].dtype == torch.float64
    with cge_kernels.backend("triton"), pytest.raises(TypeError, match="kernels know no float64"):
        cge_kernels.stripe_pool(feature_map, 1)


def test_a_wrong_scratch_budget_is_named(monkeypatch):
    monkeypatch.setenv("CGE_SCRATCH_MB", "many")
    with pytest.raises(ValueError, match="CGE_SCRATCH_MB must be a whole number of mebibytes, got 'many'"):
        cge_kernels.revise_logits(torch.rand(1, 2), torch.rand(1, 1, 3), torch.rand(1, 2, 3))
    with pytest.raises(ValueError, match="CGE_SCRATCH_MB must be a whole number"):
        cge_kernels.scratch_bytes()


@pytest.mark.parametrize("classes", [4, 5, 11, 1000])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_every_class_has_one_rank_and_the_shares_differ_by_one_at_most(classes, ranks):
    shards = [ClassShard.of_rank(classes, rank, ranks) for rank in range(ranks)]
    assert [row for shard in shards for row in range(classes)[shard.rows]] == list(range(classes))
    assert max(shard.count for shard in shards) - min(shard.count for shard in shards) <= 1
    assert all(shard.classes == classes for shard in shards)


def test_fewer_classes_than_ranks_is_an_error():
    with pytest.raises(ValueError, match="got 1 for 2 ranks"):
        ClassShard.of_rank(1, 0, 2)

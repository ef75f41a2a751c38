"""The triplet loss against a loop over anchors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_fast.losses.triplet import batch_hard_triplet


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    margin=st.sampled_from([0.0, 0.3, "soft"]),
    seed=st.integers(0, 9),
)
def test_mean_over_anchors_of_the_hardest_triplet(labels, margin, seed):
    features = torch.randn(len(labels), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for a, label in enumerate(labels):
        distance = [(features[a] - other).norm().item() for other in features]
        positive = max(d for d, other in zip(distance, labels, strict=True) if other == label)
        negative = min((d for d, other in zip(distance, labels, strict=True) if other != label), default=math.inf)
        gap = positive - negative
        total += math.log1p(math.exp(gap)) if margin == "soft" else max(0.0, gap + margin)
    loss = batch_hard_triplet(features, torch.tensor(labels), margin)
    assert loss.item() == pytest.approx(total / len(labels), abs=1e-12)


@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_gradients_stay_finite_for_equal_features_and_a_single_identity(margin):
    for labels in ([0, 0, 1, 1], [0, 0, 0, 0]):
        features = torch.ones(4, 3, requires_grad=True)
        batch_hard_triplet(features, torch.tensor(labels), margin).backward()
        assert features.grad.isfinite().all()

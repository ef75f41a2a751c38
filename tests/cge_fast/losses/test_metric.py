"""Losses of features within a batch, each against loops in float64."""

import math
from itertools import permutations
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_fast.losses.metric import Metric, metric_loss, weighted_regularised_triplet
from cge_fast.losses.triplet import batch_hard_triplet

BATCH = st.lists(st.integers(0, 2), min_size=2, max_size=6)


def features_of(labels, seed):
    return torch.randn(len(labels), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(x, y):
    return math.dist(x, y)


def cosine(x, y):
    return sum(a * b for a, b in zip(unit(x), unit(y), strict=True))


def unit(x):
    return [value / math.hypot(*x) for value in x]


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def wrt_by_loop(x, labels, eps=0.0):
    total = 0.0
    for a, label in enumerate(labels):
        positive = [distance(x[a], x[j]) for j in range(len(x)) if labels[j] == label]
        negative = [distance(x[a], x[j]) for j in range(len(x)) if labels[j] != label]
        near = [math.exp(-d) for d in negative]
        gap = sum(w * d for w, d in zip(softmax(positive), positive, strict=True))
        gap -= sum(w * d / (sum(near) + eps) for w, d in zip(near, negative, strict=True)) if negative else 0
        total += math.log1p(math.exp(gap))
    return total / len(labels)


def contrastive_by_loop(x, labels):
    """Normalised features; means over the pairs that contribute."""
    total = 0.0
    for same in (True, False):
        terms = []
        for i, j in permutations(range(len(x)), 2):
            if (labels[i] == labels[j]) == same:
                d = distance(unit(x[i]), unit(x[j]))
                terms.append(d if same else max(0.0, 1 - d))
        counted = [term for term in terms if term > 0]
        total += sum(counted) / len(counted) if counted else 0.0
    return total


def lifted_by_loop(x, labels):
    """Normalised features; half the squared hinge of each positive pair against the negatives of both its ends."""
    directions = [unit(row) for row in x]
    terms = []
    for i, j in permutations(range(len(x)), 2):
        if labels[i] == labels[j]:
            negatives = [
                math.exp(1 - distance(directions[a], directions[k]))
                for a in (i, j)
                for k in range(len(x))
                if labels[k] != labels[i]
            ]
            gap = math.log(sum(negatives)) + distance(directions[i], directions[j]) if negatives else 0.0
            terms.append(max(0.0, gap) ** 2 / 2)
    return sum(terms) / len(terms) if terms else 0.0


def instance_by_loop(x, labels):
    directions = [unit(row) for row in x]
    means = {}
    for label in sorted(set(labels)):
        own = [direction for direction, other in zip(directions, labels, strict=True) if other == label]
        means[label] = unit([sum(column) for column in zip(*own, strict=True)])
    total = 0.0
    for direction, label in zip(directions, labels, strict=True):
        scores = {other: 64 * cosine(direction, mean) for other, mean in means.items()}
        largest = max(scores.values())
        total += largest + math.log(sum(math.exp(score - largest) for score in scores.values())) - scores[label]
    return total / len(labels)


def circle_by_loop(x, labels):
    """Mean over the anchors that have positives and negatives (and a loss above 0)."""
    terms = []
    for a in range(len(x)):
        positive = [cosine(x[a], x[j]) for j in range(len(x)) if j != a and labels[j] == labels[a]]
        negative = [cosine(x[a], x[j]) for j in range(len(x)) if labels[j] != labels[a]]
        if positive and negative:
            attracted = sum(math.exp(-2 * max(0.0, 1.25 - s) * (s - 0.75)) for s in positive)
            repelled = sum(math.exp(2 * max(0.0, s + 0.25) * (s - 0.25)) for s in negative)
            terms.append(math.log1p(attracted * repelled))
    return sum(terms) / len(terms) if terms else 0.0


LOOPS = {
    "wrt": wrt_by_loop,
    "wrt_published": lambda x, labels: wrt_by_loop(x, labels, eps=1e-6),
    "contrastive": contrastive_by_loop,
    "lifted": lifted_by_loop,
    "instance": instance_by_loop,
    "circle": circle_by_loop,
}


def test_every_metric_loss_but_the_triplet_has_its_loop_here():
    assert {*LOOPS, "triplet"} == set(get_args(Metric))


@pytest.mark.parametrize("kind", LOOPS)
@settings(max_examples=30, deadline=None)
@given(labels=BATCH, seed=st.integers(0, 9))
def test_the_loss_is_the_loops(kind, labels, seed):
    features = features_of(labels, seed)
    expected = LOOPS[kind](features.tolist(), labels)
    found = metric_loss(features, torch.tensor(labels), kind, 0.3)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_triplet_takes_its_margin():
    features, labels = features_of([0, 0, 1], 1), torch.tensor([0, 0, 1])
    for margin in (0.0, 0.3, "soft"):
        assert torch.equal(
            metric_loss(features, labels, "triplet", margin), batch_hard_triplet(features, labels, margin)
        )


@pytest.mark.parametrize("kind", get_args(Metric))
def test_gradients_are_finite_for_equal_features_half_precision_and_lone_samples(kind):
    for labels in ([0, 0, 1, 1], [0, 1, 2, 3]):
        for features in (torch.ones(4, 3), torch.randn(4, 3).bfloat16()):
            leaf = features.requires_grad_()
            loss = metric_loss(leaf, torch.tensor(labels), kind, 0.3)
            assert loss.dtype == torch.float32
            if loss.requires_grad:
                loss.backward()
                assert leaf.grad.isfinite().all()


def test_far_negatives_count_in_the_stable_wrt_and_vanish_in_the_published_one():
    features = torch.tensor([[0.0], [0.0], [19.5], [19.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    stable = weighted_regularised_triplet(features, labels)
    published = weighted_regularised_triplet(features, labels, published=True)
    near = 2 * math.exp(-19.5)
    weights = near / (near + 1e-6)
    assert weights < 0.01
    assert stable.item() == pytest.approx(math.log1p(math.exp(-19.5)), rel=1e-6)
    assert published.item() == pytest.approx(math.log1p(math.exp(-19.5 * weights)), rel=1e-6)

"""Losses of features within a batch, each against loops in float64, and the sum that is trained on."""

import math
from itertools import permutations
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cge_fast import checkpoint, loop, train
from cge_fast.build import build_run
from cge_fast.cli import read_settings
from cge_fast.losses.criterion import ReidCriterion
from cge_fast.losses.metric import CenterLoss, MetricLoss, batch_hard_triplet, weighted_regularised_triplet
from cge_fast.losses.softmax import SoftmaxLoss
from cge_fast.model import Embeddings
from cge_fast.options import Metric

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


def sphere_weight(classes=3, channels=3):
    """SphereFaceLoss's own weight (C, N) of `metric`."""
    return torch.randn(channels, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def sphere_by_loop(x, labels):
    """Cross entropy of |x| cos(theta_k), and for the label |x| psi(theta): psi falls from 1 at angle 0 to -7 at pi."""
    total = 0.0
    for row, label in zip(x, labels, strict=True):
        logits = []
        for k, column in enumerate(sphere_weight().T.tolist()):
            angle = math.acos(max(-1.0, min(1.0, cosine(row, column))))
            turn = next(j for j in range(4) if angle <= (j + 1) * math.pi / 4)
            psi = (-1) ** turn * math.cos(4 * angle) - 2 * turn
            logits.append(math.hypot(*row) * (psi if k == label else math.cos(angle)))
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    return total / len(labels)


def metric(kind, margin=0.3):
    loss = MetricLoss(kind, margin, num_classes=3, channels=3)
    if kind == "sphere":
        loss.loss.W.data = sphere_weight()
    return loss


LOOPS = {
    "wrt": wrt_by_loop,
    "wrt_published": lambda x, labels: wrt_by_loop(x, labels, eps=1e-6),
    "contrastive": contrastive_by_loop,
    "lifted": lifted_by_loop,
    "instance": instance_by_loop,
    "circle": circle_by_loop,
    "sphere": sphere_by_loop,
}


def test_every_metric_loss_but_the_triplet_has_its_loop_here():
    assert {*LOOPS, "triplet"} == set(get_args(Metric))


@pytest.mark.parametrize("kind", LOOPS)
@settings(max_examples=30, deadline=None)
@given(labels=BATCH, seed=st.integers(0, 9))
def test_the_loss_is_the_loops(kind, labels, seed):
    features = features_of(labels, seed)
    expected = LOOPS[kind](features.tolist(), labels)
    found = metric(kind)(features, torch.tensor(labels))
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_triplet_takes_its_margin():
    features, labels = features_of([0, 0, 1], 1), torch.tensor([0, 0, 1])
    for margin in (0.0, 0.3, "soft"):
        found = MetricLoss("triplet", margin)(features, labels)
        assert torch.equal(found, batch_hard_triplet(features, labels, margin))


@pytest.mark.parametrize("kind", get_args(Metric))
def test_gradients_are_finite_for_equal_features_half_precision_and_lone_samples(kind):
    for labels in ([0, 0, 1, 1], [0, 1, 2]):
        for features in (torch.ones(len(labels), 3), torch.randn(len(labels), 3).bfloat16()):
            leaf = features.requires_grad_()
            loss = metric(kind)(leaf, torch.tensor(labels))
            assert loss.dtype == torch.float32
            if loss.requires_grad:
                loss.backward()
                assert leaf.grad.isfinite().all()


def test_spheres_class_weights_are_parameters_and_the_other_losses_have_none():
    assert {name: tuple(value.shape) for name, value in metric("sphere").named_parameters()} == {"loss.W": (3, 3)}
    assert not [kind for kind in get_args(Metric) if kind != "sphere" and list(metric(kind).parameters())]
    with pytest.raises(ValueError, match="sphere needs num_classes and channels, got None and None"):
        MetricLoss("sphere")


def test_spheres_class_weights_are_trained_saved_and_resumed_with_their_moments(options, tmp_path):
    train.main([*options, "--loss.metric", "sphere"])
    last = tmp_path / "run" / "checkpoints" / "last"
    run = build_run(read_settings(last / "config.yaml"), torch.device("cpu"))
    weight = run.criterion.metric.loss.W
    before = weight.detach().clone()
    loop.resume(run)
    assert weight.shape == (128, 4)
    assert torch.equal(weight, checkpoint.load_loss(last)["metric.loss.W"])
    assert not torch.equal(weight, before)
    assert run.optimizer.state[weight]["step"] == 6, "two epochs of three steps"


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


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    margin=st.sampled_from([0.0, 0.3, "soft"]),
    seed=st.integers(0, 9),
)
def test_the_triplet_is_the_mean_over_anchors_of_the_hardest_one(labels, margin, seed):
    features = features_of(labels, seed)
    total = 0.0
    for a, label in enumerate(labels):
        distances = [(features[a] - other).norm().item() for other in features]
        positive = max(d for d, other in zip(distances, labels, strict=True) if other == label)
        negative = min((d for d, other in zip(distances, labels, strict=True) if other != label), default=math.inf)
        gap = positive - negative
        total += math.log1p(math.exp(gap)) if margin == "soft" else max(0.0, gap + margin)
    loss = batch_hard_triplet(features, torch.tensor(labels), margin)
    assert loss.item() == pytest.approx(total / len(labels), abs=1e-12)


@pytest.mark.parametrize("margin", [0.3, "soft"])
def test_the_triplets_gradients_stay_finite_for_equal_features_and_a_single_identity(margin):
    for labels in ([0, 0, 1, 1], [0, 0, 0, 0]):
        features = torch.ones(4, 3, requires_grad=True)
        batch_hard_triplet(features, torch.tensor(labels), margin).backward()
        assert features.grad.isfinite().all()


def test_the_center_loss_is_the_mean_squared_distance_to_the_own_center():
    loss = CenterLoss(3, 2, rate=0.5)
    features, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2])
    centers = loss.centers.double()
    expected = sum((features[b].double() - centers[y]).square().sum() for b, y in enumerate(labels.tolist())) / 3
    torch.testing.assert_close(loss(features, labels), expected.float())


def test_the_centers_take_a_step_of_sgd():
    loss = CenterLoss(4, 3, rate=0.5)
    features, labels = torch.randn(5, 3), torch.tensor([0, 3, 3, 3, 1])
    centers = loss.centers.clone().requires_grad_()
    (features - centers[labels]).square().sum(dim=1).mean().backward()
    expected = centers.detach() - 0.5 * centers.grad
    loss.step(features, labels)
    torch.testing.assert_close(loss.centers, expected)
    assert not list(loss.parameters())


def test_the_criterion_is_the_weighted_sum_and_learns_through_each_part():
    criterion = ReidCriterion(SoftmaxLoss(3, 4), MetricLoss(), CenterLoss(4, 3), (0.5, 2.0, 0.25))
    features, labels = torch.randn(6, 3).requires_grad_(), torch.tensor([0, 0, 1, 1, 3, 3])
    out = criterion(Embeddings(features, features[:, None], features), labels)
    parts = [criterion.classification(Embeddings(features, features[:, None], features), labels).loss]
    parts += [criterion.metric(features, labels), criterion.center(features, labels)]
    torch.testing.assert_close(out.parts, torch.stack(parts).detach())
    torch.testing.assert_close(out.loss, 0.5 * parts[0] + 2 * parts[1] + 0.25 * parts[2])
    assert not out.parts.requires_grad
    assert not criterion.has_memory
    (found,) = torch.autograd.grad(out.loss, features, retain_graph=True)
    (expected,) = torch.autograd.grad(0.5 * parts[0] + 2 * parts[1] + 0.25 * parts[2], features)
    torch.testing.assert_close(found, expected)

"""Focal loss and SphereFace's logits, each against its formula spelt out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import SphereFaceLoss
from torch.nn.functional import cross_entropy

from cge_fast.losses.softmax import classification_losses, focal_losses, sphere_logits


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 5), classes=st.integers(1, 6), seed=st.integers(0, 9))
def test_the_focal_loss_of_each_sample(batch, classes, seed):
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, dtype=torch.float64, generator=random)
    labels = torch.randint(classes, (batch,), generator=random)
    found = focal_losses(logits, labels)
    for row, label, loss in zip(logits.tolist(), labels.tolist(), found.tolist(), strict=True):
        q = softmax(row)[label]
        assert loss == pytest.approx(-0.5 * (1 - q) * math.log(q), abs=1e-12)


def test_the_focal_loss_is_finite_where_the_label_is_hopeless_or_certain():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    losses = focal_losses(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0, 5000])
    assert logits.grad.isfinite().all()


def test_label_smoothing_goes_to_the_cross_entropy_alone():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 3])
    smooth = cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    for kind in ("cross_entropy", "sphere"):
        assert torch.equal(classification_losses(logits, labels, kind, 0.1), smooth)
    assert torch.equal(classification_losses(logits, labels, "focal", 0.1), focal_losses(logits, labels))


def margin_by_loop(x, weight, label):
    """SphereFace's logits of one sample: psi falls from 1 at angle 0 to -7 at pi."""
    norm = math.sqrt(sum(value**2 for value in x))
    logits = []
    for k, row in enumerate(weight):
        length = math.sqrt(sum(value**2 for value in row))
        cosine = sum(a * b for a, b in zip(x, row, strict=True)) / (norm * length)
        if k == label:
            angle = math.acos(max(-1.0, min(1.0, cosine)))
            turn = next(j for j in range(4) if angle <= (j + 1) * math.pi / 4)
            cosine = (-1) ** turn * math.cos(4 * angle) - 2 * turn
        logits.append(norm * cosine)
    return logits


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 4), classes=st.integers(1, 5), seed=st.integers(0, 9))
def test_spheres_logits_of_each_sample(batch, classes, seed):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, 3, dtype=torch.float64, generator=random)
    weight = torch.randn(classes, 3, dtype=torch.float64, generator=random)
    labels = torch.randint(classes, (batch,), generator=random)
    found = sphere_logits(features, weight, labels)
    for x, label, row in zip(features.tolist(), labels.tolist(), found.tolist(), strict=True):
        assert row == pytest.approx(margin_by_loop(x, weight.tolist(), label), abs=1e-10)


def test_sphere_has_the_loss_and_gradient_of_pytorch_metric_learning():
    torch.manual_seed(0)
    theirs = SphereFaceLoss(num_classes=5, embedding_size=7, margin=4)
    features, labels = torch.randn(6, 7, requires_grad=True), torch.tensor([0, 4, 2, 2, 1, 0])
    loss = theirs(features, labels)
    (gradient,) = torch.autograd.grad(loss, features)
    ours = cross_entropy(sphere_logits(features, theirs.W.detach().T, labels), labels)
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(torch.autograd.grad(ours, features)[0], gradient)


def test_psi_is_finite_at_both_ends():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    logits = sphere_logits(features, torch.tensor([[1.0, 0.0]]), torch.tensor([0, 0]))
    logits.sum().backward()
    assert logits.flatten().tolist() == pytest.approx([1, -7])
    assert features.grad.isfinite().all()

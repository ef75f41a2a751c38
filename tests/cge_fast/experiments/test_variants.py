"""The ablations and the controls, each against the formula of what it changes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import KERNEL_DEVICE
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, linear

import cge_kernels
from cge_fast import CGELoss, ReidModel, SoftmaxLoss, build
from cge_fast.errors import UserError
from cge_fast.experiments.variants import VARIANTS, FeatureModel, InSteps, focal_losses
from cge_fast.losses.cge import revision_weights
from cge_fast.options import LossConfig, ModelConfig, TrainConfig
from cge_reference import stripe_pool

BATCH, CHANNELS, CLASSES = 6, 8, 5
BACKENDS = ("cpu", "triton", "reference")


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    feature_map = torch.rand(BATCH, CHANNELS, 7, 3, generator=random)
    return feature_map, torch.tensor([0, 0, 1, 1, 3, 3])


def placed(batch, backend):
    """The batch where the backend runs."""
    return [tensor.to(KERNEL_DEVICE if backend == "triton" else "cpu") for tensor in batch]


def written(batch, loss_class, **arguments) -> tuple[ReidModel, nn.Module]:
    """A model without a backbone, and a loss whose memory, if it has one, has been written once."""
    model = getattr(loss_class, "model_class", ReidModel)(nn.Identity(), CHANNELS, 3, False, torch.float32)
    torch.manual_seed(0)
    loss = loss_class(CHANNELS, CLASSES, **arguments)
    nn.init.normal_(loss.weight)
    model, loss = (module.to(batch[0].device) for module in (model, loss))
    if isinstance(loss, CGELoss):
        loss.write_memory(stripe_pool(batch[0], 3)[1], batch[1], 0.25)
    return model.eval(), loss


def plain_logits(model, loss, feature_map):
    return linear(model(feature_map).embedding, loss.weight)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(batch, name):
    model, loss = written(batch, VARIANTS[name])
    leaf = batch[0].clone().requires_grad_()
    out = loss(model.train()(leaf), batch[1])
    out.loss.backward()
    assert leaf.grad.isfinite().all()
    assert loss.weight.grad.abs().sum() > 0
    assert (out.stripe_correct is None) == (not hasattr(loss, "memory"))


@pytest.mark.parametrize("base", [SoftmaxLoss, CGELoss])
def test_the_loss_in_steps_is_the_loss(batch, base):
    results = []
    for loss_class in (base, type("Steps", (InSteps, base), {})):
        model, loss = written(batch, loss_class, label_smoothing=0.2)
        leaf = batch[0].clone().requires_grad_()
        out = loss(model(leaf), batch[1])
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad, loss.weight.grad, out.correct, out.stripe_correct))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", [name for name, loss in VARIANTS.items() if issubclass(loss, InSteps)])
def test_wrong_labels_are_refused(batch, name):
    model, loss = written(batch, VARIANTS[name])
    labels = batch[1].clone()
    for wrong in (5, -1, -100):
        labels[0] = wrong
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 5\), got {wrong}"):
            loss(model(batch[0]), labels)


@pytest.mark.parametrize("name", ["scaled", "cge_scaled"])
def test_logit_scale_multiplies_the_logits(batch, name):
    model, plain = written(batch, VARIANTS[name])
    model, scaled = written(batch, VARIANTS[name], scale=0.71)
    embeddings = model(batch[0])
    torch.testing.assert_close(scaled.revised_logits(embeddings), 0.71 * plain.revised_logits(embeddings))
    logits = 0.71 * plain.revised_logits(embeddings)
    expected = cross_entropy(logits, batch[1], label_smoothing=0.1)
    torch.testing.assert_close(scaled(embeddings, batch[1]).loss, expected)


def test_detached_weights_change_the_gradient_but_not_the_loss(batch):
    gradients, losses = [], []
    for loss_class in (CGELoss, VARIANTS["detached_weights"]):
        model, loss = written(batch, loss_class)
        leaf = batch[0].clone().requires_grad_()
        out = loss(model(leaf), batch[1])
        out.loss.backward()
        gradients.append(leaf.grad)
        losses.append(out.loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["focal", "cge_focal"])
def test_the_focal_loss_takes_the_revised_logits(batch, name, backend):
    batch = placed(batch, backend)
    with cge_kernels.backend(backend):
        model, loss = written(batch, VARIANTS[name])
        embeddings = model(batch[0])
        logits = loss.revised_logits(embeddings)
        out = loss(embeddings, batch[1])
        plain = plain_logits(model, loss, batch[0])
        if name == "cge_focal":
            plain *= revision_weights(embeddings.stripes, loss.memory)
    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(out.loss, focal_losses(logits, batch[1]).mean())
    assert torch.equal(out.correct, logits.argmax(1) == batch[1])


def test_the_focal_loss_knows_no_label_smoothing(batch):
    model, _ = written(batch, VARIANTS["focal"])
    smoothed, not_smoothed = (
        written(batch, VARIANTS["focal"], label_smoothing=smoothing)[1](model(batch[0]), batch[1]).loss
        for smoothing in (0.3, 0.0)
    )
    assert torch.equal(smoothed, not_smoothed)


@pytest.mark.parametrize("name", ["feature", "cge_feature"])
def test_features_are_the_convolutions_maps_revised_map_by_map_and_averaged(batch, name):
    feature_map, labels = batch
    model, loss = written(batch, VARIANTS[name])
    embeddings = model.train()(feature_map)
    maps = conv2d(feature_map, loss.weight[:, :, None, None])
    if name == "cge_feature":
        maps = maps * revision_weights(embeddings.stripes, loss.memory)[:, :, None, None]
    expected = cross_entropy(maps.mean(dim=(2, 3)), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss(embeddings, labels).loss, expected)


def test_a_feature_is_found_by_the_average_without_bnneck(batch):
    model, _ = written(batch, VARIANTS["feature"])
    model.train()(batch[0])
    assert not model.neck.weight.requires_grad
    torch.testing.assert_close(model.eval().embed(batch[0]), batch[0].mean(dim=(2, 3)), rtol=1e-5, atol=0)


def test_features_are_averaged_not_pooled_otherwise():
    with pytest.raises(UserError, match=r"^loss.variant: feature .* needs model.pooling average$"):
        FeatureModel(nn.Identity(), CHANNELS, 3, True, torch.float32)


def test_a_memory_that_is_not_used_leaves_the_logits_and_is_still_written_and_measured(batch):
    feature_map, labels = batch
    model, loss = written(batch, VARIANTS["memory_not_used"])
    _, used = written(batch, CGELoss)
    torch.testing.assert_close(loss.memory, used.memory)
    embeddings, logits = model(feature_map), plain_logits(model, loss, feature_map)
    torch.testing.assert_close(loss.revised_logits(embeddings), logits)
    out = loss(embeddings, labels)
    torch.testing.assert_close(out.loss, cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(out.stripe_correct, used(embeddings, labels).stripe_correct)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shuffled_memory_revises_each_class_by_another_and_is_written_to_the_true_one(batch, backend):
    feature_map, labels = batch = placed(batch, backend)
    with cge_kernels.backend(backend):
        model, shuffled = written(batch, VARIANTS["shuffled_memory"])
        _, plain = written(batch, CGELoss)
        embeddings = model(feature_map)
        weights = revision_weights(embeddings.stripes, plain.memory)[:, shuffled.shuffled]
        out, plain_out = shuffled(embeddings, labels), plain(embeddings, labels)
        revising = revision_weights(embeddings.stripes, shuffled.revising_memory)
        measured = shuffled.label_and_mean_weight(embeddings.stripes, labels)
    torch.testing.assert_close(shuffled.memory, plain.memory)
    assert sorted(shuffled.shuffled.tolist()) == list(range(CLASSES))
    assert (shuffled.shuffled.cpu() != torch.arange(CLASSES)).all()
    torch.testing.assert_close(revising, weights)
    own = weights.gather(1, labels[:, None])
    torch.testing.assert_close(measured, torch.stack([own.sum(), weights.mean(dim=1).sum()]))
    logits = plain_logits(model, plain, feature_map) * weights
    torch.testing.assert_close(out.loss, cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(out.stripe_correct, plain_out.stripe_correct)
    assert "shuffled" not in shuffled.state_dict()


def test_one_class_cannot_be_shuffled():
    with pytest.raises(ValueError, match="a shuffled memory needs at least 2 classes, got 1"):
        VARIANTS["shuffled_memory"](CHANNELS, 1)


@pytest.mark.parametrize(("cge", "variant"), [(True, "focal"), (False, "cge_focal"), (False, "cge_feature")])
def test_a_variant_goes_with_a_memory_or_without(cge, variant):
    config = TrainConfig(model=ModelConfig(cge=cge), loss=LossConfig(variant=variant))
    with pytest.raises(UserError, match=f"^loss.variant: {variant} goes with model.cge {str(not cge).lower()}$"):
        build.loss_class(config, VARIANTS)


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 5), classes=st.integers(1, 6), seed=st.integers(0, 9))
def test_the_focal_loss_of_each_sample(batch, classes, seed):
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, dtype=torch.float64, generator=random)
    labels = torch.randint(classes, (batch,), generator=random)
    losses = focal_losses(logits, labels)
    for row, label, loss in zip(logits.tolist(), labels.tolist(), losses.tolist(), strict=True):
        q = softmax(row)[label]
        assert loss == pytest.approx(-0.5 * (1 - q) * math.log(q), abs=1e-12)


def test_the_focal_loss_is_finite_where_the_label_is_hopeless_or_certain():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    losses = focal_losses(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0, 5000])
    assert logits.grad.isfinite().all()

"""CGEHead by itself, as somebody else's loop uses it."""

import math
from typing import get_args

import pytest
import torch
from torch.nn.functional import cross_entropy

import cge_kernels
from cge_fast import CGEHead
from cge_fast.losses.cge import memory_alpha
from cge_fast.losses.softmax import focal_losses, sphere_logits
from cge_fast.operators import Kernels
from cge_reference import revise_logits, stripe_pool, write_memory_

BATCH, CHANNELS, CLASSES, EPOCHS = 6, 8, 5, 4


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    feature_map = torch.rand(BATCH, CHANNELS, 7, 3, generator=random)
    return feature_map, torch.tensor([0, 0, 1, 1, 3, 3])


def head(**options) -> CGEHead:
    torch.manual_seed(0)
    made = CGEHead(CHANNELS, CLASSES, EPOCHS, **options)
    torch.nn.init.normal_(made.classifier.weight)
    return made


@pytest.mark.parametrize("pooling", ["average", "gem"])
def test_the_loss_is_the_mean_cross_entropy_of_the_revised_logits(batch, pooling):
    feature_map, labels = batch
    made = head(pooling=pooling)
    made.write_memory(made(feature_map, labels).local_features, labels, 1)
    out = made(feature_map, labels)
    _, local_features = stripe_pool(feature_map, 3, made.p)
    revised = revise_logits(made.classifier(out.embedding), local_features, made.memory)
    torch.testing.assert_close(out.loss, cross_entropy(revised, labels, label_smoothing=0.1))
    assert torch.equal(out.hit, revised.argmax(1) == labels)
    scores = torch.einsum("bic,ikc->bik", local_features, made.memory)
    assert torch.equal(out.local_hit, scores.argmax(2) == labels[:, None])
    made.eval()
    torch.testing.assert_close(
        made.revise(feature_map), made.classifier(made(feature_map)) * _weights(made, feature_map)
    )


def _weights(made, feature_map):
    _, local_features = stripe_pool(feature_map, 3, made.p)
    return revise_logits(torch.ones(BATCH, CLASSES), local_features, made.memory)


def test_the_output_feeds_other_losses_and_the_memory_without_a_graph(batch):
    out = head()(*batch)
    assert out.loss.dim() == 0
    assert out.global_feature.requires_grad
    assert out.embedding.requires_grad
    assert not out.local_features.requires_grad
    assert out.local_features.shape == (BATCH, 3, CHANNELS)


def test_without_labels_it_gives_the_embedding_after_bnneck(batch):
    feature_map, _ = batch
    made = head(pooling="average").eval()
    made.neck.running_mean.fill_(0.5)
    global_feature = feature_map.mean(dim=(2, 3))
    torch.testing.assert_close(made(feature_map), (global_feature - 0.5) / math.sqrt(1 + 1e-5))
    torch.testing.assert_close(made.embed(feature_map, after_neck=False), global_feature)


def test_bnneck_has_a_frozen_zero_bias_and_the_classifier_none(batch):
    made = head()
    made(*batch).loss.backward()
    assert made.classifier.bias is None
    assert made.neck.bias.grad is None
    assert (made.neck.bias == 0).all()
    assert made.p.grad is not None


def test_the_baseline_has_neither_memory_nor_local_features(batch):
    feature_map, labels = batch
    made = head(cge=False)
    out = made(feature_map, labels)
    torch.testing.assert_close(out.loss, cross_entropy(made.classifier(out.embedding), labels, label_smoothing=0.1))
    assert out.local_features is None
    assert out.local_hit is None
    assert made.memory is None
    made.write_memory(out.local_features, labels, 1)
    torch.testing.assert_close(made.eval().revise(feature_map), made.classifier(made(feature_map)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{"kernels": "fused"}, {"kernels": "one_pass"}, {"cge": False}])
def test_wrong_labels_are_refused_by_every_loss(batch, options, compiled):
    feature_map, labels = batch
    made = head(**options)
    refusing = torch.compile(made, fullgraph=True, backend="aot_eager") if compiled else made
    for wrong in (5, -1, -100):
        labels[0] = wrong
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 5\), got {wrong}"):
            refusing(feature_map, labels)
    with pytest.raises(TypeError, match=r"labels must have an integer dtype, got torch.float32"):
        made(feature_map, labels.float())
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\) to fit .*, got \(5,\)"):
        made(feature_map, labels[1:])


@pytest.mark.parametrize("cge", [True, False])
def test_small_integer_labels_are_as_good(batch, cge):
    feature_map, labels = batch
    assert torch.equal(head(cge=cge)(feature_map, labels.int()).loss, head(cge=cge)(feature_map, labels).loss)


def test_another_loss_trains_on_revised_logits_and_writes_what_was_pooled(batch):
    feature_map, labels = batch
    made = head()
    made.revise(feature_map).square().mean().backward()
    _, local_features = made.pool(feature_map.detach())
    made.write_memory(local_features.detach(), labels, 1)
    torch.testing.assert_close(made.memory[:, 1].norm(dim=1), torch.ones(3))


def test_the_embedding_needs_no_stripes():
    assert head().eval()(torch.rand(1, CHANNELS, 2, 2)).shape == (1, CHANNELS)


@pytest.mark.parametrize("cge", [True, False])
def test_logit_scale_multiplies_the_logits(batch, cge):
    feature_map, _ = batch
    plain, scaled = head(cge=cge).eval(), head(cge=cge, logit_scale=0.71).eval()
    torch.testing.assert_close(scaled.revise(feature_map), 0.71 * plain.revise(feature_map))


def test_detached_weights_change_the_gradient_but_not_the_loss(batch):
    feature_map, labels = batch
    gradients, losses = [], []
    for local_gradient in (True, False):
        made = head(local_gradient=local_gradient)
        write_memory_(made.memory, feature_map[:, :, :3, 0].transpose(1, 2), labels, 0.5)
        leaf = feature_map.clone().requires_grad_()
        loss = made(leaf, labels).loss
        loss.backward()
        gradients.append(leaf.grad)
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.equal(gradients[0], gradients[1])


def test_the_memory_is_saved_with_the_model_and_is_no_parameter(batch):
    made = head()
    made.write_memory(made(*batch).local_features, batch[1], 1)
    fresh = head()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh.memory, made.memory)
    assert "memory" not in dict(made.named_parameters())


def test_writing_before_the_backward_pass_is_caught_by_autograd(batch):
    feature_map, labels = batch
    made = head()
    made.write_memory(made(feature_map, labels).local_features, labels, 1)
    out = made(feature_map.requires_grad_(), labels)
    made.write_memory(out.local_features, labels, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_micro_batches_written_at_once_are_the_whole_batch(batch):
    feature_map, labels = batch
    whole, pieces = head(), head()
    whole.write_memory(stripe_pool(feature_map, 3, 3.0)[1], labels, 2)
    parts = [stripe_pool(part, 3, 3.0)[1] for part in feature_map.split(2)]
    pieces.write_memory(torch.cat(parts), labels, 2)
    assert torch.equal(whole.memory, pieces.memory)


def test_one_epoch_in_all_means_alpha_one_and_still_fills_the_memory(batch):
    feature_map, labels = batch
    made = CGEHead(CHANNELS, CLASSES, epochs=1)
    first = made(feature_map, labels).local_features
    made.write_memory(first, labels, 1)
    seen = made.memory[:, labels.unique()].clone()
    torch.testing.assert_close(seen.norm(dim=2), torch.ones(3, 3))
    made.write_memory(torch.rand(BATCH, 3, CHANNELS), labels, 1)
    torch.testing.assert_close(made.memory[:, labels.unique()], seen)


def test_an_identity_first_seen_in_the_last_epoch_is_remembered(batch):
    feature_map, labels = batch
    made = head()
    made.write_memory(made(feature_map, labels).local_features, labels, 1)
    late = torch.rand(1, 3, CHANNELS)
    made.write_memory(late, torch.tensor([4]), EPOCHS)
    torch.testing.assert_close(made.memory[:, 4], torch.nn.functional.normalize(late[0], dim=1))


def test_autocast_leaves_the_head_in_float32(batch):
    feature_map, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        out = head()(feature_map, labels)
    assert out.embedding.dtype == torch.float32
    torch.testing.assert_close(out.loss, head()(feature_map, labels).loss)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0]),
        ("exponential", [1.0, math.exp(-5 / 16), math.exp(-20 / 16), math.exp(-45 / 16)]),
        ("constant", [0.01] * 4),
    ],
)
def test_alpha_strategies(strategy, expected):
    assert [memory_alpha(strategy, epoch, 4) for epoch in (1, 2, 3, 4)] == pytest.approx(expected)


@pytest.mark.parametrize("epoch", [0, 5])
def test_epochs_count_from_one(epoch):
    with pytest.raises(ValueError, match=f"epoch must lie between 1 and 4, got {epoch}"):
        memory_alpha("linear", epoch, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stripes": 0}, "stripes must be at least 1, got 0"),
        ({"pooling": "max"}, "pooling must be one of average, gem, got 'max'"),
        ({"alpha": "cosine"}, "alpha must be one of linear, exponential, constant, got 'cosine'"),
        ({"label_smoothing": 2.0}, r"label_smoothing must lie in \[0, 1\], got 2.0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CGEHead(CHANNELS, CLASSES, EPOCHS, **options)


def test_more_stripes_than_rows_are_refused(batch):
    with pytest.raises(ValueError, match="stripes must lie between 1 and the feature map's height 7, got 8"):
        head(stripes=8)(*batch)


# Rounding changes a training by a multiple of the unit roundoff u that belongs to the training, not to the dtype: what
# each step adds, and how far BatchNorm over 8 samples magnifies it in the steps that follow. For these 20 steps with
# seeds 0 to 3 the reference, fused and one_pass leave the reference in float64 by up to 600 u in float64, 3800 u in
# float32. The bound is above 4 times that, in both dtypes: a formula that differs would not come 2^29 times closer in
# float64.
ROUNDING = 2**14


def train_head(kernels, pooling, dtype=torch.float32, steps=20):
    """Losses, final memory and weights of a small backbone with a head, trained on six noisy patterns."""
    torch.manual_seed(0)
    patterns = torch.rand(6, 3, 7, 4)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU()).to(dtype)
    head = CGEHead(8, 6, epochs=steps, stripes=3, pooling=pooling, kernels=kernels).to(dtype)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.2)
    losses = []
    for step in range(1, steps + 1):
        labels = torch.arange(8) % 6
        images = patterns[labels] + 0.3 * torch.rand(8, 3, 7, 4)
        out = head(backbone(images.to(dtype)), labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        head.write_memory(out.local_features, labels, step)
        losses.append(out.loss.detach())
    return torch.stack(losses), head.memory, head.classifier.weight.detach(), out.local_hit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pooling", ["average", "gem"])
@pytest.mark.parametrize("kernels", get_args(Kernels))
def test_all_kernels_train_to_the_same_loss_curve(kernels, pooling, dtype):
    *trained, local_hit = train_head(kernels, pooling, dtype)
    *truth, true_local_hit = train_head("reference", pooling, torch.float64)
    assert truth[0][-1] < 0.5 * truth[0][0]  # a curve that goes somewhere
    unit_roundoff = torch.finfo(dtype).eps / 2
    for found, true in zip(trained, truth, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), true, rtol=0, atol=ROUNDING * unit_roundoff)
    assert torch.equal(local_hit, true_local_hit)


def test_the_kernels_run_on_triton_as_well_to_the_same_loss_curve():
    with cge_kernels.backend("triton"):
        losses, memory, _, _ = train_head("fused", "gem", steps=3)
    true_losses, true_memory, _, _ = train_head("reference", "gem", steps=3)
    torch.testing.assert_close(losses, true_losses, rtol=2e-4, atol=0)
    torch.testing.assert_close(memory, true_memory, rtol=0, atol=2e-4)


@pytest.mark.parametrize("cge", [True, False])
def test_revise_is_the_same_with_all_kernels(cge):
    feature_map = torch.rand(4, 5, 6, 2)
    torch.manual_seed(0)
    heads = {kernels: CGEHead(5, 7, epochs=1, cge=cge, kernels=kernels) for kernels in get_args(Kernels)}
    for head in heads.values():
        head.load_state_dict(heads["fused"].state_dict())
        if cge:
            head.write_memory(head.pool(feature_map)[1].detach(), torch.arange(4), 1)
    expected = heads["reference"].revise(feature_map)
    for head in heads.values():
        torch.testing.assert_close(head.revise(feature_map), expected)


@pytest.mark.parametrize("kernels", ["fused", "one_pass"])
def test_torch_compile_takes_the_whole_head_in_one_graph(kernels):
    torch.manual_seed(0)
    head = CGEHead(5, 7, epochs=1, kernels=kernels)
    feature_map, labels = torch.rand(4, 5, 6, 2), torch.tensor([0, 3, 6, 3])
    results = []
    for function in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        x = feature_map.clone().requires_grad_()
        out = function(x, labels)
        out.loss.backward()
        results.append((out.loss.detach(), x.grad, out.hit, out.local_hit))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_unknown_kernels_are_named():
    with pytest.raises(ValueError, match="kernels must be one of fused, one_pass, reference, got 'fast'"):
        CGEHead(5, 7, epochs=1, kernels="fast")


def written(batch, **options):
    """A head whose memory has been written once."""
    made = head(pooling="average", **options)
    _, local_features = made.pool(batch[0])
    made.write_memory(local_features, batch[1], 1)
    return made


@pytest.mark.parametrize("kernels", get_args(Kernels))
@pytest.mark.parametrize("cge", [True, False])
def test_the_focal_loss_takes_the_revised_logits(batch, cge, kernels):
    made = written(batch, cge=cge, classification="focal", kernels=kernels).eval()
    logits = made.revise(batch[0])
    out = made(*batch)
    torch.testing.assert_close(out.loss, focal_losses(logits, batch[1]).mean())
    assert torch.equal(out.hit, logits.argmax(1) == batch[1])


def test_spheres_margin_is_set_before_the_revision_and_only_in_training(batch):
    feature_map, labels = batch
    made = written(batch, classification="sphere", logit_scale=0.5).eval()
    embedding = made(feature_map)
    margin = 0.5 * sphere_logits(embedding, made.classifier.weight, labels)
    expected = cross_entropy(margin * _weights(made, feature_map), labels, label_smoothing=0.1)
    torch.testing.assert_close(made(feature_map, labels).loss, expected)
    torch.testing.assert_close(made.revise(feature_map), 0.5 * made.classifier(embedding) * _weights(made, feature_map))


def test_revised_maps_are_the_classifiers_maps_times_their_stripes_sigmoids(batch):
    feature_map, labels = batch
    made = written(batch, revision="features").eval()
    made.neck.running_mean.fill_(0.3)
    _, local_features = stripe_pool(feature_map, 3, None)
    scores = torch.einsum("bic,ikc->bik", torch.nn.functional.normalize(local_features, dim=2), made.memory).sigmoid()
    stripes_of_row = [[0], [0], [0, 1], [1], [1, 2], [2], [2]]  # 7 rows: two stripes share a row with a neighbour
    logits = torch.zeros(BATCH, CLASSES)
    for row, stripes in enumerate(stripes_of_row):
        for column in range(3):
            position = made.neck(feature_map[:, :, row, column])
            weight = torch.stack([scores[:, stripe] for stripe in stripes]).mean(dim=0)
            logits += made.classifier(position) * weight / 21
    torch.testing.assert_close(made.revise(feature_map), logits)
    out = made(feature_map, labels)
    torch.testing.assert_close(out.loss, cross_entropy(logits, labels, label_smoothing=0.1))
    torch.testing.assert_close(out.embedding, made(feature_map))


def test_training_on_revised_maps_passes_gradients_through_the_weights_unless_detached(batch):
    gradients = []
    for local_gradient in (True, False):
        leaf = batch[0].clone().requires_grad_()
        written(batch, revision="features", local_gradient=local_gradient)(leaf, batch[1]).loss.backward()
        gradients.append(leaf.grad)
    assert not torch.equal(*gradients)


def test_a_memory_that_is_not_used_leaves_the_logits_and_is_still_written_and_measured(batch):
    feature_map, labels = batch
    made = written(batch, revision="none").eval()
    torch.testing.assert_close(made.revise(feature_map), made.classifier(made(feature_map)))
    out = made(feature_map, labels)
    torch.testing.assert_close(out.loss, cross_entropy(made.classifier(made(feature_map)), labels, label_smoothing=0.1))
    assert torch.equal(out.local_hit, written(batch).eval()(feature_map, labels).local_hit)


@pytest.mark.parametrize("kernels", get_args(Kernels))
def test_a_shuffled_memory_revises_each_class_by_another_and_is_written_to_the_true_one(batch, kernels):
    feature_map, labels = batch
    plain, shuffled = (written(batch, shuffle_memory=shuffle, kernels=kernels).eval() for shuffle in (False, True))
    torch.testing.assert_close(shuffled.memory, plain.memory)
    assert sorted(shuffled.shuffled.tolist()) == list(range(CLASSES))
    assert (shuffled.shuffled != torch.arange(CLASSES)).all()
    _, local_features = stripe_pool(feature_map, 3, None)
    weights = plain.revision_weights(local_features)
    torch.testing.assert_close(shuffled.revision_weights(local_features), weights[:, shuffled.shuffled])
    logits = plain.classifier(plain(feature_map)) * weights[:, shuffled.shuffled]
    out = shuffled(feature_map, labels)
    torch.testing.assert_close(out.loss, cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(out.local_hit, plain(feature_map, labels).local_hit)
    assert "shuffled" not in shuffled.state_dict()


def test_revision_weights_are_what_the_logits_are_multiplied_by(batch):
    made = written(batch).eval()
    local_features = made.pool(batch[0])[1]
    weights = made.revision_weights(local_features)
    torch.testing.assert_close(made.classifier(made(batch[0])) * weights, made.revise(batch[0]))
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "maps"}, "revision must be one of logits, features, none, got 'maps'"),
        ({"classification": "hinge"}, "classification must be one of cross_entropy, focal, sphere, got 'hinge'"),
        ({"revision": "features"}, "revision 'features' .* goes with pooling 'average' .* got 'gem'"),
        ({"revision": "features", "pooling": "average", "classification": "focal"}, "got 'average' and 'focal'"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CGEHead(CHANNELS, CLASSES, EPOCHS, **options)


def test_one_class_cannot_be_shuffled():
    with pytest.raises(ValueError, match="shuffle_memory needs at least 2 classes, got 1"):
        CGEHead(CHANNELS, 1, EPOCHS, shuffle_memory=True)

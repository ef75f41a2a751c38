"""The cumulated loss."""

import pytest
import torch

from cge_fast.analyze.loss_cdf import loss_cdf, sample_losses, train_losses
from cge_fast.errors import UserError

SETTINGS = ["--loss.label_smoothing", "0.2"]


def larger_logits(run):
    loss = run.criterion.classification
    loss.weight.mul_(300)
    if run.config.model.cge:
        loss.memory.normal_(generator=torch.Generator().manual_seed(0))
        loss.memory.div_(loss.memory.norm(dim=2, keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cge", "variant"),
    [
        *(("true", variant) for variant in ("", "cge_focal", "cge_feature", "shuffled_memory")),
        *(("false", variant) for variant in ("", "focal", "feature")),
    ],
)
def test_the_mean_of_the_samples_is_the_loss_of_training(opened, train_set, cge, variant):
    options = ["--model.cge", cge, "--loss.variant", variant, "--loss.smoothed", "others"]
    trained = opened("mine", *options, *SETTINGS, change=larger_logits)
    images, labels = train_set(trained)
    embeddings = trained.model(images)
    losses = sample_losses(trained.loss, embeddings, labels)
    assert losses.shape == labels.shape
    assert losses.std() > 0.1
    torch.testing.assert_close(losses.mean(), trained.loss(embeddings, labels).loss, rtol=1e-6, atol=0)


def test_the_images_of_least_loss_make_their_share_of_the_loss(opened, rows_of, tmp_path):
    first = opened("first", change=larger_logits)
    second = opened("second", "--model.cge", "false", *SETTINGS, change=larger_logits)
    written = loss_cdf([first, second], tmp_path)
    for trained in (first, second):
        losses = sorted(train_losses(trained).tolist())
        rows = [row for row in rows_of(written.table) if row["checkpoint"] == trained.label]
        shares = [(float(row["share_of_images"]), float(row["share_of_loss"])) for row in rows]
        assert (shares[0], len(shares)) == ((0, 0), 501)
        assert shares[-1] == pytest.approx((1, 1))
        for images, share in shares:
            count = round(images * len(losses))
            assert images == count / len(losses)
            assert share == pytest.approx(sum(losses[:count]) / sum(losses))
        hardest = sum(losses[22:]) / sum(losses)  # of 24 images: 450 of 500 steps are 21.6 images, so 22
        assert f"{trained.label}: the hardest tenth makes {hardest:.1%} of it" in written.summary
    assert written.picture.exists()


def test_losses_that_are_not_finite_are_refused(opened, tmp_path):
    trained = opened("broken", change=lambda run: run.criterion.classification.weight.fill_(3e38))
    with pytest.raises(UserError, match=r"^checkpoint .*: the loss of a training image is not finite$"):
        loss_cdf([trained], tmp_path)

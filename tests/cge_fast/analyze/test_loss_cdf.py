"""The distribution of the loss."""

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
        *(("true", variant) for variant in ("", "cge_focal", "cge_sphere", "revised_maps", "shuffled_memory")),
        *(("false", variant) for variant in ("", "focal", "sphere")),
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


def test_shares_of_images_up_to_parts_of_the_largest_loss(opened, rows_of, tmp_path):
    first = opened("first", change=larger_logits)
    second = opened("second", "--model.cge", "false", *SETTINGS, change=larger_logits)
    written = loss_cdf([first, second], tmp_path)
    rows = rows_of(written.table)
    for trained in (first, second):
        losses = train_losses(trained)
        mine = [{k: v if k == "checkpoint" else float(v) for k, v in r.items()} for r in rows]
        mine = [row for row in mine if row["checkpoint"] == trained.label]
        assert [row["normalised_loss"] for row in mine] == pytest.approx([part / 500 for part in range(501)])
        assert mine[-1]["loss"] == losses.max().item()
        assert mine[-1]["share"] == 1
        assert mine[0]["share"] == 0
        for row in mine:
            assert row["loss"] == pytest.approx(row["normalised_loss"] * losses.max().item())
            assert row["share"] == (losses <= row["loss"]).double().mean().item()
        assert f"{trained.label}: largest {losses.max():.3f}" in written.summary
    assert written.picture.exists()


def test_losses_that_are_not_finite_are_refused(opened, tmp_path):
    trained = opened("broken", change=lambda run: run.criterion.classification.weight.fill_(3e38))
    with pytest.raises(UserError, match=r"^checkpoint .*: the loss of a training image is not finite$"):
        loss_cdf([trained], tmp_path)

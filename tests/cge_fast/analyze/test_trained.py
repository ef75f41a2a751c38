"""Opening a checkpoint and passing over its training images."""

import shutil
from dataclasses import replace

import PIL.Image
import pytest
import torch

from cge_fast.analyze.trained import (
    open_checkpoint,
    require_cge,
    train_batches,
)
from cge_fast.errors import UserError


def test_a_checkpoint_is_called_by_its_run_or_by_its_folder_or_as_one_likes(saved, tmp_path):
    last = saved("mine")
    assert open_checkpoint(last).label == "mine"
    assert open_checkpoint(last, "CGE").label == "CGE"
    copied = shutil.copytree(last, tmp_path / "sent")
    assert open_checkpoint(copied).label == "sent"


def test_a_network_without_cge_is_refused_where_cge_is_needed(opened):
    with_cge, without = opened("cge"), opened("bot", "--model.cge", "false")
    require_cge([with_cge], "levels")
    with pytest.raises(UserError, match=r"^checkpoint .*bot.*: levels needs CGE, this was trained with model.cge fal"):
        require_cge([with_cge, without], "levels")


def test_the_pass_gives_every_training_image_once_as_evaluation_sees_it(opened, train_set):
    trained = opened("mine")
    batches = list(train_batches(trained))
    assert [len(labels) for _, labels in batches] == [7, 7, 7, 3]
    images, labels = train_set(trained)
    assert torch.equal(torch.cat([part for part, _ in batches]), images)
    assert torch.equal(torch.cat([part for _, part in batches]), labels)


def test_looking_changes_nothing_and_records_no_gradient(opened, train_set):
    trained = opened("mine")
    parts = (trained.model, trained.loss)
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    images, labels = train_set(trained)
    output = trained.loss(trained.model(images), labels)
    assert not output.loss.requires_grad
    for part, values in zip(parts, before, strict=True):
        assert all(torch.equal(values[name], value) for name, value in part.state_dict().items())


def test_another_training_set_is_refused(opened, market, tmp_path):
    trained = opened("mine")
    other = shutil.copytree(market, tmp_path / "market")
    PIL.Image.new("RGB", (16, 24)).save(other / "bounding_box_train" / "0099_c1s1_000000_00.png")
    with pytest.raises(UserError, match=r"^data: checkpoint .*last was trained on 4 identities, market1501 has 5$"):
        next(train_batches(open_checkpoint(trained.folder, data=replace(trained.config.data, root=other))))

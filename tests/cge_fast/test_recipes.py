"""Every value of the published recipes that differs between them or from the embedded set's."""

from dataclasses import asdict

import pytest

from cge_fast import train
from cge_fast.cli import RECIPES, read_settings, recipes
from cge_fast.errors import UserError
from cge_fast.options import TrainConfig

METHODS = {
    "bot": {
        ("model", "non_local"): "none",
        ("model", "pooling"): "average",
        ("loss", "metric"): "triplet",
    },
    "agw": {
        ("model", "non_local"): "one",
        ("model", "pooling"): "gem",
        ("loss", "metric"): "wrt",
    },
}
VARIANTS = {
    "original": {
        ("data", "height"): 256,
        ("data", "erased"): "mean",
        ("model", "cge"): False,
        ("model", "classifier_std"): 0.001,
        ("loss", "smoothed"): "all",
        ("loss", "margin"): 0.3,
        ("optim", "warmup"): 10,
        ("optim", "warmup_steps"): 0,
        ("optim", "warmup_factor"): 0.01,
        ("optim", "by_epoch"): True,
        ("optim", "milestones"): [40, 70],
        ("optim", "milestones_after_warmup"): False,
    },
    "fastreid": {
        ("data", "height"): 256,
        ("data", "erased"): "zero",
        ("model", "cge"): False,
        ("model", "classifier_std"): 0.01,
        ("loss", "smoothed"): "others",
        ("loss", "margin"): "soft",
        ("optim", "warmup_steps"): 2000,
        ("optim", "warmup_factor"): 0.1,
        ("optim", "by_epoch"): False,
        ("optim", "milestones"): [40, 90],
        ("optim", "milestones_after_warmup"): True,
    },
    "cge": {
        ("data", "height"): 384,
        ("data", "erased"): "zero",
        ("model", "cge"): True,
        ("model", "stripes"): 3,
        ("model", "memory_momentum"): "linear",
        ("model", "classifier_std"): 0.001,
        ("loss", "smoothed"): "all",
        ("loss", "margin"): 0,
        ("optim", "warmup"): 10,
        ("optim", "warmup_steps"): 0,
        ("optim", "warmup_factor"): 0.1,
        ("optim", "by_epoch"): False,
        ("optim", "milestones"): [40, 90],
        ("optim", "milestones_after_warmup"): False,
    },
}
START = {
    "imagenet": {
        ("model", "pretrained"): True,
        ("model", "weights"): None,
        ("model", "map_norm"): False,
        ("data", "normalisation"): "imagenet",
    },
    "upt": {
        ("model", "pretrained"): False,
        ("model", "weights"): "weights/lup_moco_r50.pth",
        ("model", "map_norm"): True,
        ("data", "normalisation"): "luperson",
    },
}
EVERYWHERE = {
    ("data", "name"): "market1501",
    ("data", "width"): 128,
    ("data", "flip"): 0.5,
    ("data", "pad"): 10,
    ("data", "erasing"): 0.5,
    ("data", "erasing_area"): 0.4,
    ("data", "identities"): 16,
    ("data", "instances"): 4,
    ("model", "backbone"): "resnet50",
    ("loss", "variant"): "",
    ("loss", "label_smoothing"): 0.1,
    ("loss", "classification_weight"): 1,
    ("loss", "metric_weight"): 1,
    ("loss", "center_lr"): 0.5,
    ("optim", "epochs"): 120,
    ("optim", "lr"): 3.5e-4,
    ("optim", "weight_decay"): 5e-4,
    ("optim", "gamma"): 0.1,
    ("evaluation", "metric"): "cosine",
    ("evaluation", "neck"): "after",
    ("evaluation", "flip_test"): False,
    ("evaluation", "rerank"): False,
}
PUBLISHED = {
    "bot_original": ("bot", "original", "imagenet"),
    "bot_fastreid": ("bot", "fastreid", "imagenet"),
    "agw_original": ("agw", "original", "imagenet"),
    "agw_fastreid": ("agw", "fastreid", "imagenet"),
    "cge_bot": ("bot", "cge", "imagenet"),
    "cge_agw": ("agw", "cge", "imagenet"),
    "cge_upt_bot": ("bot", "cge", "upt"),
    "cge_upt_agw": ("agw", "cge", "upt"),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_value_of_a_published_recipe(recipe):
    method, variant, start = PUBLISHED[recipe]
    center = {("loss", "center_weight"): 5e-4 if recipe == "agw_original" else 0}
    settings = asdict(read_settings(RECIPES / f"{recipe}.yaml"))
    for (section, key), value in (EVERYWHERE | METHODS[method] | VARIANTS[variant] | START[start] | center).items():
        found = settings[section][key]
        assert (str(found) if key == "weights" and found else found) == value, (section, key)


def test_the_defaults_are_the_recipe_pedestrians_cge():
    assert asdict(read_settings(RECIPES / "pedestrians_cge.yaml")) == asdict(TrainConfig())


def test_the_embedded_sets_baseline_differs_from_cge_in_nothing_else():
    bot, cge = (asdict(read_settings(RECIPES / f"pedestrians_{kind}.yaml")) for kind in ("bot", "cge"))
    assert not bot["model"].pop("cge")
    assert cge["model"].pop("cge")
    assert bot == cge


def test_a_recipe_is_found_by_its_name():
    assert recipes() == sorted([*PUBLISHED, "pedestrians_bot", "pedestrians_cge"])
    config, _, _ = train.parse(["--config", "cge_bot", "--model.cge", "false", "--data.name", "msmt17"])
    assert (config.model.backbone, config.model.cge, config.data.name) == ("resnet50", False, "msmt17")


def test_a_recipe_whose_weights_are_not_there_says_which_file_to_place_where(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--data.height", "32", "--data.width", "16"]
    with pytest.raises(UserError, match=r"no file weights/lup_moco_r50.pth; place weights of resnet50 .* there"):
        train.main(["--config", "cge_upt_bot", *options, *size])

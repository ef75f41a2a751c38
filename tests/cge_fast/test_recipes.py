"""Every value of the published recipes that differs between them or from the embedded set's."""

from dataclasses import asdict

import pytest

from cge_fast import train
from cge_fast.cli import RECIPES, read_settings, recipes
from cge_fast.errors import UserError
from cge_fast.options import TrainConfig

# What each public code has, read at these commits:
#   reid-strong-baseline: michuanhaohao/reid-strong-baseline 3da7e6f
#   ReID-Survey: mangye16/ReID-Survey 38f5912
#   FastReID: JDAI-CV/fast-reid c9bc3ce
#   LUPerson: DengpanFu/LUPerson d5fa344, its fork of FastReID in fast-reid/, which the CGE paper builds on
METHODS = {
    "bot": {
        ("model", "non_local"): "none",
        ("model", "pooling"): "average",
        ("loss", "metric"): "triplet",
    },
    "agw": {
        # inter_channels = reduc_ratio // reduc_ratio in ReID-Survey's and FastReID's non_local.py
        ("model", "non_local"): "one",
        ("model", "pooling"): "gem",
        # softmax_weights in ReID-Survey's and FastReID's triplet_loss.py: max(-dist * mask) is 0, and + 1e-6
        ("loss", "metric"): "wrt_published",
    },
}
VARIANTS = {
    "original": {
        ("data", "height"): 256,
        # RandomErasing in both codes' transforms: sl 0.02, sh 0.4, r1 0.3, uniform aspect, 100 tries, mean=PIXEL_MEAN
        ("data", "erasing_area"): 0.4,
        ("data", "erasing_aspect"): "uniform",
        ("data", "erased"): "mean",
        # T.Resize without an interpolation
        ("data", "interpolation"): "bilinear",
        # RandomIdentitySampler in both codes' triplet_sampler.py
        ("data", "sampler"): "random",
        ("model", "cge"): False,
        # "add missed relu" in the comments of both codes' resnet.py
        ("model", "stem"): "without_relu",
        # ReID-Survey's GeneralizedMeanPoolingP
        ("model", "gem_learned"): True,
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
        # T.RandomErasing(p=rea_prob, value=rea_value) in FastReID's transforms/build.py: torchvision's, with its areas
        # 0.02 to 0.33, log-uniform aspect and 10 tries, before normalisation with the mean colour
        ("data", "erasing_area"): 0.33,
        ("data", "erasing_aspect"): "log_uniform",
        ("data", "erased"): "zero",
        # T.Resize(..., interpolation=3) there
        ("data", "interpolation"): "bicubic",
        # SAMPLER_TRAIN in FastReID's Base-bagtricks.yml
        ("data", "sampler"): "naive",
        ("model", "cge"): False,
        # MaxPool2d(kernel_size=3, stride=2, ceil_mode=True) in FastReID's resnet.py
        ("model", "stem"): "ceil_pool",
        ("model", "classifier_std"): 0.01,
        ("loss", "smoothed"): "others",
        # TRI.MARGIN in FastReID's Base-bagtricks.yml; its 0 would be the soft margin
        ("loss", "margin"): 0.3,
        ("optim", "warmup_steps"): 2000,
        ("optim", "warmup_factor"): 0.1,
        ("optim", "by_epoch"): False,
        ("optim", "milestones"): [40, 90],
        # LRScheduler.after_epoch in FastReID's hooks.py
        ("optim", "milestones_after_warmup"): True,
    },
    "cge": {
        ("data", "height"): 384,
        # RandomErasing in LUPerson's transforms.py: sl 0.02, sh 0.4, r1 0.3, uniform aspect, 100 tries
        ("data", "erasing_area"): 0.4,
        ("data", "erasing_aspect"): "uniform",
        # T.Resize(size_train, interpolation=3) in LUPerson's transforms/build.py
        ("data", "interpolation"): "bicubic",
        # NAIVE_WAY in LUPerson's Base-bagtricks.yml
        ("data", "sampler"): "naive",
        ("model", "cge"): True,
        # MaxPool2d(kernel_size=3, stride=2, padding=1) and the ReLU in LUPerson's resnet.py
        ("model", "stem"): "torchvision",
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
LUPERSONS_AGW = {
    # inter_channels = in_channels // reduc_ratio in LUPerson's non_local.py
    ("model", "non_local"): "half",
    # POOL_LAYER "gempool" in LUPerson's Base-AGW.yml is GeneralizedMeanPooling, whose p is a number
    ("model", "gem_learned"): False,
    # the CGE paper's equations 7 and 8
    ("loss", "metric"): "wrt",
}
OF_ONE_RECIPE = {
    # CENTER_LOSS_WEIGHT in ReID-Survey's AGW_baseline.yml
    "agw_original": {("loss", "center_weight"): 5e-4},
    # POOL_LAYER GeneralizedMeanPooling in FastReID's Base-AGW.yml, whose p is a number
    "agw_fastreid": {("model", "gem_learned"): False},
    "cge_agw": LUPERSONS_AGW,
    "cge_upt_agw": LUPERSONS_AGW,
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
        # EXTRA_BN, PIXEL_MEAN and PIXEL_STD in LUPerson's configs/CMDM/mgn_R50_moco.yml
        ("model", "map_norm"): True,
        ("data", "normalisation"): "luperson",
        # REA.MEAN [0, 0, 0] there; ImageNet's mean colour in Base-bagtricks.yml
        ("data", "erased"): "black",
    },
}
EVERYWHERE = {
    ("data", "name"): "market1501",
    ("data", "width"): 128,
    ("data", "flip"): 0.5,
    ("data", "pad"): 10,
    ("data", "erasing"): 0.5,
    ("data", "erased"): "zero",
    ("data", "identities"): 16,
    ("data", "instances"): 4,
    ("model", "backbone"): "resnet50",
    ("model", "gem_learned"): True,
    ("loss", "variant"): "",
    ("loss", "label_smoothing"): 0.1,
    ("loss", "classification_weight"): 1,
    ("loss", "metric_weight"): 1,
    ("loss", "center_weight"): 0,
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
    settings = asdict(read_settings(RECIPES / f"{recipe}.yaml"))
    values = EVERYWHERE | METHODS[method] | VARIANTS[variant] | START[start] | OF_ONE_RECIPE.get(recipe, {})
    for (section, key), value in values.items():
        found = settings[section][key]
        assert (str(found) if key == "weights" and found else found) == value, (section, key)


def test_the_defaults_are_the_recipe_pedestrians_cge():
    assert asdict(read_settings(RECIPES / "pedestrians_cge.yaml")) == asdict(TrainConfig())


def test_the_embedded_sets_baseline_differs_from_cge_in_nothing_else():
    bot, cge = (asdict(read_settings(RECIPES / f"pedestrians_{kind}.yaml")) for kind in ("bot", "cge"))
    assert not bot["model"].pop("cge")
    assert cge["model"].pop("cge")
    assert bot == cge


def test_the_pretrained_recipe_differs_from_the_default_in_where_it_starts_and_how_fast_it_learns():
    own, default = (asdict(read_settings(RECIPES / f"pedestrians_{kind}.yaml")) for kind in ("pretrained", "cge"))
    assert {
        f"{section}.{key}": value
        for section in ("data", "model", "loss", "optim", "evaluation")
        for key, value in own[section].items()
        if value != default[section][key]
    } == {
        "data.height": 128,
        "data.width": 64,
        "data.normalisation": "half",
        "model.backbone": "efficientnet_lite0",
        "model.pretrained": True,
        "optim.epochs": 10,
        "optim.lr": 1e-3,
        "optim.precision": "float32",
    }


def test_a_recipe_is_found_by_its_name():
    embedded = ["pedestrians_bot", "pedestrians_cge", "pedestrians_pretrained"]
    assert recipes() == sorted([*PUBLISHED, *embedded, "own"])
    config, _, _ = train.parse(["--config", "cge_bot", "--model.cge", "false", "--data.name", "msmt17"])
    assert (config.model.backbone, config.model.cge, config.data.name) == ("resnet50", False, "msmt17")


def test_a_recipe_whose_weights_are_not_there_says_which_file_to_place_where(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--data.height", "32", "--data.width", "16"]
    with pytest.raises(UserError, match=r"no file weights/lup_moco_r50.pth; place weights of resnet50 .* there"):
        train.main(["--config", "cge_upt_bot", *options, *size])

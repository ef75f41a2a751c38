"""A trained network in somebody else's program."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import cge_fast
from cge_fast.data import read
from cge_fast.data.images import Image
from cge_fast.errors import UserError
from cge_fast.evaluation.features import embed


@pytest.fixture(scope="module")
def model(shared_run) -> cge_fast.TrainedModel:
    return cge_fast.load(shared_run, "cpu")


@pytest.fixture(scope="module")
def images(model) -> list[Image]:
    return read(model.config.data).gallery


@pytest.fixture(scope="module")
def features(model, images) -> torch.Tensor:
    """As evaluation computes them."""
    return embed(model.model, images, model.config.data, model.config.evaluation, "gallery")


@pytest.fixture(scope="module")
def pixels(images) -> np.ndarray:
    """(N, H, W, 3) uint8, in the network's size."""
    return np.stack([np.asarray(PIL.Image.open(image.path)) for image in images])


def test_paths_are_embedded_as_evaluation_does(model, images, features):
    assert features.shape == (20, 128)
    paths = [image.path for image in images]
    assert torch.equal(model.embed(paths), features)
    assert torch.equal(model.embed(map(str, paths), progress=True), features)
    assert not features.requires_grad


def test_the_same_pixels_have_the_same_features_however_they_are_held(model, images, features, pixels):
    pillow = [PIL.Image.open(image.path) for image in images]
    assert torch.equal(model.embed(pillow), features)
    assert torch.equal(model.embed(pixels), features)
    assert torch.equal(model.embed([images[0].path, pillow[1], pixels[2]]), model.embed(pillow[:3]))
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(model.embed(tensor), features)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(model.embed((tensor.double() / 255).to(dtype)), features, rtol=1e-4, atol=1e-5)


def test_arrays_may_be_views_as_of_opencvs_colours(model, features, pixels):
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    assert torch.equal(model.embed([image[..., ::-1] for image in bgr]), features)
    assert not torch.allclose(model.embed(bgr), features)


def test_images_of_any_size_are_resized(model):
    ramp = np.linspace(0, 255, 45 * 31 * 3).reshape(45, 31, 3).astype(np.uint8)
    by_pillow = PIL.Image.fromarray(ramp).resize((16, 24), PIL.Image.Resampling.BILINEAR)
    assert torch.equal(model.embed([ramp]), model.embed([by_pillow]))
    tensor = torch.from_numpy(ramp).permute(2, 0, 1)[None]
    torch.testing.assert_close(model.embed(tensor), model.embed([ramp]), rtol=0, atol=0.05)


def test_other_modes_are_read_as_files_of_them_are(model):
    grey = PIL.Image.linear_gradient("L")
    assert torch.equal(model.embed([grey]), model.embed([grey.convert("RGB")]))


@pytest.mark.parametrize("batch", [1, 3, 20, 21])
def test_batches_do_not_matter_and_none_is_lost(model, images, features, pixels, batch):
    paths = [image.path for image in images]
    torch.testing.assert_close(model.embed(paths, batch), features, rtol=1e-4, atol=1e-5)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.embed(tensor, batch), features, rtol=1e-4, atol=1e-5)


def test_no_image_gives_no_feature(model):
    assert model.embed([]).shape == model.embed(torch.empty(0, 3, 24, 16)).shape == (0, 128)


def test_processes_read_many_images(shared_run, images, features):
    made = cge_fast.load(shared_run, "cpu")
    many = cge_fast.load(shared_run, "cpu", replace(made.config.data, workers=2))
    torch.testing.assert_close(many.embed([image.path for image in images], 8), features, rtol=1e-4, atol=1e-5)


def test_the_settings_may_be_others_than_the_trainings(shared_run, images, model, features):
    paths = [image.path for image in images]
    evaluation = replace(model.config.evaluation, flip_test=True, neck="before")
    data = replace(model.config.data, height=32)
    assert not torch.allclose(cge_fast.load(shared_run, "cpu", evaluation=evaluation).embed(paths), features)
    assert not torch.allclose(cge_fast.load(shared_run, "cpu", data).embed(paths), features)


@pytest.mark.parametrize("folder", ["", "checkpoints/last", "checkpoints/best", "checkpoints/last/model.safetensors"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_a_checkpoint_or_its_file_is_opened(shared_run, folder, kind):
    assert cge_fast.load(kind(shared_run / folder), "cpu").folder.name == (folder.split("/")[1:2] or ["last"])[0]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("a.jpg", TypeError, r"images must be a sequence \(of one image, \[image\]\), got str"),
        (PIL.Image.new("L", (4, 4)), TypeError, "must be a sequence"),
        (np.zeros((24, 16, 3), np.uint8), TypeError, r"an array \(H, W, 3\) uint8, got \(16, 3\) uint8"),
        ([np.zeros((24, 16, 3), np.float32)], TypeError, r"got \(24, 16, 3\) float32"),
        ([torch.zeros(3, 24, 16)], TypeError, r"Pillow's, or an array \(H, W, 3\) uint8, got Tensor"),
        (torch.zeros(2, 24, 16, 3), ValueError, r"images must be \(N, 3, H, W\), uint8 or floating, got \(2, 24"),
        (torch.zeros(2, 3, 24, 16).int(), ValueError, "got .* int32"),
        (torch.full((2, 3, 24, 16), 1.01), ValueError, "floating must be from 0 to 1, not normalised"),
        (torch.full((2, 3, 24, 16), torch.nan), ValueError, "floating must be from 0 to 1"),
        (["/nix/a.jpg"], UserError, "image /nix/a.jpg cannot be read"),
    ],
)
def test_what_cannot_be_embedded_is_named(model, wrong, error, message):
    with pytest.raises(error, match=message):
        model.embed(wrong)


def test_the_name_is_there_before_anything_heavy():
    code = "import sys, cge_fast; assert 'torch' not in sys.modules; print(cge_fast.load.__module__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "cge_fast.api\n"

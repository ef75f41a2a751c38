"""Augmentation of batches: what torchvision's transforms give image by image, bit for bit, and what it is to be."""

import math

import PIL.Image
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from cge_fast.data.augment import ERASED_ASPECT, Augment, Normalise, draw, erased_box, mean_and_std
from cge_fast.options import DataConfig

WHITE, BLACK = 255, 0


class UniformErasing(v2.RandomErasing):
    """Random erasing as its authors publish it, as a transform of torchvision."""

    def make_params(self, flat_inputs):
        _, height, width = flat_inputs[0].shape
        for _ in range(100):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            aspect = torch.empty(1).uniform_(*self.ratio).item()
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                i, j = (int(torch.randint(free + 1, ())) for free in (height - h, width - w))
                return {"i": i, "j": j, "h": h, "w": w, "v": torch.tensor(self.value)[:, None, None]}
        return {"i": 0, "j": 0, "h": 0, "w": 0, "v": None}


def torchvisions(config: DataConfig) -> v2.Compose:
    """The same augmentation of one picture by torchvision's transforms."""
    mean, std = mean_and_std(config)
    black = [-m / s for m, s in zip(mean, std, strict=True)]
    value = {"zero": 0, "mean": mean_and_std(DataConfig())[0], "black": black}[config.erased]
    erasing = v2.RandomErasing if config.erasing_aspect == "log_uniform" else UniformErasing
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(config.flip),
            *([v2.RandomCrop((config.height, config.width), padding=config.pad)] if config.pad else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
            erasing(config.erasing, scale=(0.02, config.erasing_area), ratio=ERASED_ASPECT, value=value),
        ]
    )


@st.composite
def configs(draw):
    return DataConfig(
        height=draw(st.integers(1, 40)),
        width=draw(st.integers(1, 40)),
        flip=draw(st.sampled_from([0, 0.1, 0.5, 1])),
        pad=draw(st.integers(0, 12)),
        erasing=draw(st.sampled_from([0, 0.5, 1])),
        erasing_aspect=draw(st.sampled_from(["uniform", "log_uniform"])),
        erasing_area=draw(st.sampled_from([0.02, 0.1, 0.4, 1])),
        erased=draw(st.sampled_from(["zero", "mean", "black"])),
        normalisation=draw(st.sampled_from(["imagenet", "luperson"])),
    )


@settings(deadline=None, max_examples=60)
@given(configs(), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
@example(DataConfig(height=1, width=1, pad=0, erasing=1), [0, 1])
@example(DataConfig(height=384, width=128, pad=10, erasing=1, erasing_aspect="uniform"), [2**63 - 1, 5])
def test_a_batch_is_what_torchvision_makes_of_each_image(config, seeds):
    images = torch.randint(256, (len(seeds), config.height, config.width, 3), dtype=torch.uint8)
    augment, drawn = Augment(config), torch.stack([draw(config, seed) for seed in seeds])
    found = augment(images, drawn)
    assert torch.equal(augment.all_at_once(images, drawn), found)
    for image, image_found, seed in zip(images, found, seeds, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = torchvisions(config)(PIL.Image.fromarray(image.numpy()))
        assert torch.equal(image_found, expected)


def test_memory_is_taken_again_but_not_from_a_batch_that_is_held():
    config = DataConfig(height=4, width=2, pad=0, flip=0, erasing=0)
    augment, drawn = Augment(config), torch.stack([draw(config, 0)])
    batches = [torch.full((1, 4, 2, 3), value, dtype=torch.uint8) for value in range(4)]
    held = [augment(batch, drawn) for batch in batches]
    assert [batch.unique().numel() for batch in held] == [3] * 4
    assert len({batch.data_ptr() for batch in held}) == 4
    for batch, other in zip(batches, held, strict=True):
        assert torch.equal(Augment(config)(batch, drawn), other)
    places, batch = set(), None
    for _ in range(6):
        batch = augment(batches[0], drawn)  # as in a loop, the last one is held until it is replaced
        places.add(batch.data_ptr())
    assert len(places) == 2


def augmented(image, config: DataConfig, seed: int = 0) -> torch.Tensor:
    """(3, H, W) of an image (H, W, 3), or of one that has everywhere the same value."""
    if isinstance(image, int):
        image = torch.full((config.height, config.width, 3), image, dtype=torch.uint8)
    return Augment(config)(image[None], draw(config, seed)[None])[0]


def normalised(image, config: DataConfig) -> torch.Tensor:
    if isinstance(image, int):
        image = torch.full((config.height, config.width, 3), image, dtype=torch.uint8)
    return Normalise(config)(image[None])[0]


@pytest.mark.parametrize("normalisation", ["imagenet", "luperson"])
def test_without_augmentation_training_sees_what_evaluation_sees(normalisation):
    image, config = torch.arange(384, dtype=torch.uint8).view(16, 8, 3), DataConfig(height=16, width=8)
    config.flip = config.pad = config.erasing = 0
    config.normalisation = normalisation
    assert torch.equal(augmented(image, config), normalised(image, config))


def test_a_certain_flip_mirrors():
    image, config = torch.arange(384, dtype=torch.uint8).view(16, 8, 3), DataConfig(flip=1, pad=0, erasing=0)
    assert torch.equal(augmented(image, config), normalised(image.flip(1), config))


def test_the_images_are_in_memory_as_convolutions_want_them_and_no_copy_is_made_of_them():
    images = torch.zeros(2, 8, 6, 3, dtype=torch.uint8)
    for module, drawn in ((Normalise, ()), (Augment, (torch.zeros(2, 7, dtype=torch.int64),))):
        assert module(DataConfig())(images, *drawn).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("erased", "written"), [("zero", torch.zeros(3)), ("mean", torch.tensor([0.485, 0.456, 0.406]))]
)
@pytest.mark.parametrize(
    ("aspect", "normalisation"), [("uniform", "imagenet"), ("log_uniform", "imagenet"), ("log_uniform", "luperson")]
)
def test_erasing_takes_2_to_40_percent_and_leaves_the_chosen_values(aspect, normalisation, erased, written):
    erasing = {"erasing": 1, "erased": erased, "erasing_aspect": aspect}
    config = DataConfig(flip=0, pad=0, normalisation=normalisation, **erasing)
    are_written = [augmented(WHITE, config, seed) == written[:, None, None] for seed in range(100)]
    shares = [one.all(dim=0).float().mean().item() for one in are_written]
    assert 0.01 < min(shares) < 0.1
    assert 0.3 < max(shares) < 0.42


def erased_boxes(count, **options):
    """(height, width) float64 of what is erased from so many images of 384 x 128."""
    random, config = torch.Generator().manual_seed(0), DataConfig(height=384, width=128, **options)
    return torch.tensor([erased_box(config, random)[2:] for _ in range(count)], dtype=torch.float64)


@pytest.mark.parametrize("normalisation", ["imagenet", "luperson"])
def test_erased_black_is_what_becomes_of_a_black_image(normalisation):
    config = DataConfig(flip=0, pad=0, erasing=1, erased="black", normalisation=normalisation)
    torch.testing.assert_close(augmented(WHITE, config).amin(dim=(1, 2)), normalised(BLACK, config)[:, 0, 0])


def test_the_largest_erased_area_can_be_chosen():
    for aspect in ("uniform", "log_uniform"):
        shares = erased_boxes(200, erasing_area=0.1, erasing_aspect=aspect).prod(dim=1) / (384 * 128)
        assert 0.08 < max(shares) < 0.11


# Measured of Zhong et al.'s code and of torchvision's; the tolerances are three standard errors of 2,000 drawings.
@pytest.mark.parametrize(("aspect", "share", "wide"), [("uniform", 0.198, 0.13), ("log_uniform", 0.177, 0.31)])
def test_a_uniform_aspect_erases_more_and_fewer_wide_boxes(aspect, share, wide):
    boxes = erased_boxes(2000, erasing_aspect=aspect)
    assert (boxes.prod(dim=1) / (384 * 128)).mean() == pytest.approx(share, abs=0.008)
    assert (boxes[:, 1] > boxes[:, 0]).double().mean() == pytest.approx(wide, abs=0.032)


def test_the_uniform_aspect_is_uniform_between_its_bounds():
    boxes = erased_boxes(500, erasing_aspect="uniform", erasing_area=0.1)
    aspects = boxes[:, 0] / boxes[:, 1]
    assert 0.28 < aspects.min() < 0.6 < 3 < aspects.max() < 3.6
    assert aspects.mean() == pytest.approx((0.3 + 1 / 0.3) / 2, abs=0.15), "of a uniform logarithm it is 1.26"


def test_an_image_that_no_box_fits_is_left_whole():
    config = DataConfig(height=200, width=1, flip=0, pad=0, erasing=1, erasing_aspect="uniform")
    assert torch.equal(augmented(WHITE, config), normalised(WHITE, config))


def test_cropping_shifts_by_at_most_the_padding():
    config = DataConfig(height=16, width=8, flip=0, pad=2, erasing=0)
    for seed in range(20):
        padded = (augmented(WHITE, config, seed) == normalised(BLACK, config)[:, :1, :1]).all(dim=0)
        assert padded.all(dim=1).sum() <= 2
        assert padded.all(dim=0).sum() <= 2

"""Images on their way into batches."""

from collections import Counter

import PIL.Image
import pytest
import torch

from cge_fast.data import Image
from cge_fast.data.batches import (
    TrainImages,
    mean_and_std,
    test_loader,
    test_transform,
    train_labels,
    train_loader,
    train_transform,
)
from cge_fast.data.images import open_rgb
from cge_fast.data.sampler import PKSampler
from cge_fast.options import DataConfig

test_loader.__test__ = test_transform.__test__ = False  # functions of the package, not tests


@pytest.fixture
def images(tmp_path):
    made = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        PIL.Image.new("RGB", (6, 10), (number * 20, 10, 200)).save(path)
        made.append(Image(path, identity=50 - number // 3, camera=number % 3))
    return made


def config(**options) -> DataConfig:
    return DataConfig(height=16, width=8, workers=0, **options)


def test_labels_follow_the_order_of_the_identities(images):
    assert train_labels(images) == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("normalisation", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("luperson", (0.3525, 0.3106, 0.3140), (0.2505, 0.2522, 0.2504)),
    ],
)
def test_evaluation_resizes_and_normalises_and_nothing_else(images, normalisation, mean, std):
    settings = config(normalisation=normalisation)
    assert mean_and_std(settings) == (mean, std)
    (batch,) = test_loader(images[:1], 4, settings)
    mean, std = torch.tensor(mean), torch.tensor(std)
    expected = (torch.tensor([0, 10, 200]) / 255 - mean) / std
    assert batch.shape == (1, 3, 16, 8)
    torch.testing.assert_close(batch, expected[None, :, None, None].expand_as(batch))


@pytest.mark.parametrize("normalisation", ["imagenet", "luperson"])
def test_without_augmentation_training_sees_what_evaluation_sees(images, normalisation):
    picture = open_rgb(images[3].path)
    plain = train_transform(config(flip=0, pad=0, erasing=0, normalisation=normalisation))(picture)
    assert torch.equal(plain, test_transform(config(normalisation=normalisation))(picture))


def test_a_certain_flip_mirrors(tmp_path):
    picture = PIL.Image.effect_noise((8, 16), 60).convert("RGB")
    flipped = train_transform(config(flip=1, pad=0, erasing=0))(picture)
    assert torch.equal(flipped, test_transform(config())(picture).flip(2))


@pytest.mark.parametrize(
    ("erased", "written"), [("zero", torch.zeros(3)), ("mean", torch.tensor([0.485, 0.456, 0.406]))]
)
@pytest.mark.parametrize(
    ("aspect", "normalisation"), [("uniform", "imagenet"), ("log_uniform", "imagenet"), ("log_uniform", "luperson")]
)
def test_erasing_takes_2_to_40_percent_and_leaves_the_chosen_values(aspect, normalisation, erased, written):
    picture = PIL.Image.new("RGB", (48, 96), (255, 255, 255))
    erasing = {"erasing": 1, "erased": erased, "erasing_aspect": aspect}
    transform = train_transform(DataConfig(flip=0, pad=0, normalisation=normalisation, **erasing))
    shares = [(transform(picture) == written[:, None, None]).all(dim=0).float().mean().item() for _ in range(100)]
    assert 0.01 < min(shares) < 0.1
    assert 0.3 < max(shares) < 0.42


def erased_boxes(count, **options):
    """(height, width) float64 of what is erased from so many images of 384 x 128."""
    erase = train_transform(DataConfig(height=384, width=128, erasing=1, **options)).transforms[-1]
    torch.manual_seed(0)
    drawn = [erase.make_params([torch.ones(3, 384, 128)]) for _ in range(count)]
    return torch.tensor([(box["h"], box["w"]) for box in drawn], dtype=torch.float64)


@pytest.mark.parametrize("normalisation", ["imagenet", "luperson"])
def test_erased_black_is_what_becomes_of_a_black_image(normalisation):
    settings = DataConfig(flip=0, pad=0, erasing=1, erased="black", normalisation=normalisation)
    white, black = (PIL.Image.new("RGB", (48, 96), (value,) * 3) for value in (255, 0))
    darkest = train_transform(settings)(white).amin(dim=(1, 2))
    torch.testing.assert_close(darkest, test_transform(settings)(black)[:, 0, 0])


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
    picture = PIL.Image.new("RGB", (1, 200), (255, 255, 255))
    settings = DataConfig(height=200, width=1, flip=0, pad=0, erasing=1, erasing_aspect="uniform")
    assert torch.equal(train_transform(settings)(picture), test_transform(settings)(picture))


def test_interpolation_is_pillows_bilinear_or_bicubic():
    picture = PIL.Image.effect_noise((31, 47), 90).convert("RGB")
    for name, method in (("bilinear", PIL.Image.Resampling.BILINEAR), ("bicubic", PIL.Image.Resampling.BICUBIC)):
        sized = test_transform(config(interpolation=name))(picture)
        assert torch.equal(sized, test_transform(config())(picture.resize((8, 16), method)))


def test_cropping_shifts_by_at_most_the_padding():
    picture = PIL.Image.new("RGB", (8, 16), (255, 255, 255))
    transform = train_transform(config(flip=0, pad=2, erasing=0))
    black = test_transform(config())(PIL.Image.new("RGB", (8, 16)))[:, :1, :1]
    for _ in range(20):
        padded = (transform(picture) == black).all(dim=0)
        assert padded.all(dim=1).sum() <= 2
        assert padded.all(dim=0).sum() <= 2


def test_the_seed_alone_decides_the_augmentation(images):
    dataset = TrainImages(images, train_labels(images), config())
    before = torch.get_rng_state()
    first, _ = dataset[0, 7]
    torch.rand(3)
    assert torch.equal(first, dataset[0, 7][0])
    assert any(not torch.equal(first, dataset[0, seed][0]) for seed in range(8, 16))
    torch.set_rng_state(before)
    expected = torch.rand(1)
    torch.set_rng_state(before)
    dataset[0, 3]
    assert torch.equal(torch.rand(1), expected), "the training's own random numbers are not disturbed"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_workers(images, workers):
    def epoch(workers):
        sampler = PKSampler(train_labels(images), 2, 2, seed=1)
        settings = config()
        settings.workers = workers
        return list(train_loader(images, sampler, settings, pin_memory=False))

    for (one, one_labels), (other, other_labels) in zip(epoch(0), epoch(workers), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one_labels, other_labels)
        assert set(Counter(one_labels.tolist()).values()) == {2}


@pytest.mark.parametrize("change", ["jitter", "autoaugment"])
def test_colours_change_with_their_probability_by_the_images_seed(images, change):
    def drawn(**options):
        settings = config(flip=0, pad=0, erasing=0, **options)
        train = TrainImages(images[:1], [0], settings)
        return [train[0, seed][0] for seed in range(40)]

    plain, always, again, half = drawn(), drawn(**{change: 1}), drawn(**{change: 1}), drawn(**{change: 0.5})
    assert all(torch.equal(image, plain[0]) for image in plain)
    assert all(torch.equal(one, other) for one, other in zip(always, again, strict=True))
    changed = [sum(not torch.equal(image, plain[0]) for image in found) for found in (always, half)]
    assert 0 < changed[1] < changed[0]

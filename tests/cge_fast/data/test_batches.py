"""Images on their way into batches."""

import struct
import zlib
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
from cge_fast.errors import UserError
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
@pytest.mark.parametrize("normalisation", ["imagenet", "luperson"])
def test_erasing_takes_2_to_40_percent_and_leaves_the_chosen_values(normalisation, erased, written):
    picture = PIL.Image.new("RGB", (48, 96), (255, 255, 255))
    transform = train_transform(DataConfig(flip=0, pad=0, erasing=1, erased=erased, normalisation=normalisation))
    shares = [(transform(picture) == written[:, None, None]).all(dim=0).float().mean().item() for _ in range(100)]
    assert 0.01 < min(shares) < 0.1
    assert 0.3 < max(shares) < 0.42


@pytest.mark.parametrize("normalisation", ["imagenet", "luperson"])
def test_erased_black_is_what_becomes_of_a_black_image(normalisation):
    settings = DataConfig(flip=0, pad=0, erasing=1, erased="black", normalisation=normalisation)
    white, black = (PIL.Image.new("RGB", (48, 96), (value,) * 3) for value in (255, 0))
    darkest = train_transform(settings)(white).amin(dim=(1, 2))
    torch.testing.assert_close(darkest, test_transform(settings)(black)[:, 0, 0])


def test_the_largest_erased_area_can_be_chosen():
    picture = PIL.Image.new("RGB", (48, 96), (255, 255, 255))
    transform = train_transform(DataConfig(flip=0, pad=0, erasing=1, erasing_area=0.1))
    shares = [(transform(picture) == 0).all(dim=0).float().mean().item() for _ in range(100)]
    assert 0.08 < max(shares) < 0.11


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


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"image .*broken.jpg cannot be read"):
        open_rgb(path)


def test_an_image_that_claims_a_huge_size_is_named(tmp_path):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 20_000, 20_000)  # width and height in the header, whose checksum follows
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"image .*bomb.png cannot be read \(Image size \(400000000 pixels\) exceeds"):
        open_rgb(path)


def test_grey_and_palette_images_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1"):
        PIL.Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.png")
        assert open_rgb(tmp_path / f"{mode}.png").mode == "RGB"

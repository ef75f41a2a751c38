"""Images on their way into batches."""

from collections import Counter

import PIL.Image
import pytest
import torch

from cge_fast.data import Image
from cge_fast.data.augment import mean_and_std
from cge_fast.data.batches import TrainImages, plain_batches, train_labels, train_loader
from cge_fast.data.sampler import PKSampler
from cge_fast.options import DataConfig

CPU = torch.device("cpu")


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
    (batch,) = plain_batches(images[:1], 4, settings, CPU, "one")
    mean, std = torch.tensor(mean), torch.tensor(std)
    expected = (torch.tensor([0, 10, 200]) / 255 - mean) / std
    assert batch.shape == (1, 3, 16, 8)
    torch.testing.assert_close(batch, expected[None, :, None, None].expand_as(batch))


def test_the_seed_alone_decides_the_augmentation(images):
    dataset = TrainImages(images, train_labels(images), config())
    before = torch.get_rng_state()
    _, first, _ = dataset[0, 7]
    torch.rand(3)
    assert torch.equal(first, dataset[0, 7][1])
    assert any(not torch.equal(first, dataset[0, seed][1]) for seed in range(8, 16))
    torch.set_rng_state(before)
    expected = torch.rand(1)
    torch.set_rng_state(before)
    dataset[0, 3]
    assert torch.equal(torch.rand(1), expected), "the training's own random numbers are not disturbed"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_batches_are_the_same_for_any_number_of_workers_and_any_cache(images, workers, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CGE_CACHE", str(tmp_path))

    def epoch(workers, cache):
        sampler = PKSampler(train_labels(images), 2, 2, seed=1)
        settings = config(cache=cache)
        settings.workers = workers
        return list(train_loader(images, sampler, settings, pin_memory=False))

    for one, other in zip(epoch(0, "none"), epoch(workers, cache), strict=True):
        for tensor, other_tensor in zip(one, other, strict=True):
            assert torch.equal(tensor, other_tensor)
        pixels, drawn, labels = other
        assert (pixels.shape, pixels.dtype, drawn.shape) == ((4, 16, 8, 3), torch.uint8, (4, 7))
        assert set(Counter(labels.tolist()).values()) == {2}


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

"""From images to batches of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from cge_fast.data.images import Image, open_rgb
from cge_fast.options import DataConfig

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "luperson": ((0.3525, 0.3106, 0.3140), (0.2505, 0.2522, 0.2504)),
}
SMALLEST_ERASED_AREA = 0.02  # the paper's parameters of random erasing
ERASED_ASPECT = (0.3, 1 / 0.3)


def to_size(config: DataConfig) -> list[v2.Transform]:
    """Resizes to height x width and makes a uint8 tensor."""
    return [v2.Resize((config.height, config.width), antialias=True), v2.ToImage()]


def mean_and_std(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of red, green and blue, of values from 0 to 1, that images are normalised with."""
    return NORMALISATIONS[config.normalisation]


def normalised(config: DataConfig) -> list[v2.Transform]:
    """To float32 values from 0 to 1, less their mean, by their standard deviation."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*mean_and_std(config))]


def train_transform(config: DataConfig) -> v2.Compose:
    """Resize, flip, pad and crop, normalise, random erasing: BagTricks' order."""
    size = (config.height, config.width)
    imagenet_mean, _ = NORMALISATIONS["imagenet"]
    erased, area = imagenet_mean if config.erased == "mean" else 0, (SMALLEST_ERASED_AREA, config.erasing_area)
    flip = v2.RandomHorizontalFlip(config.flip)
    crop = [v2.RandomCrop(size, padding=config.pad)] if config.pad else []
    erase = v2.RandomErasing(config.erasing, scale=area, ratio=ERASED_ASPECT, value=erased)
    return v2.Compose([*to_size(config), flip, *crop, *normalised(config), erase])


def test_transform(config: DataConfig) -> v2.Compose:
    """Resize and normalise."""
    return v2.Compose([*to_size(config), *normalised(config)])


class TestImages(Dataset):
    """Images as evaluation sees them."""

    def __init__(self, images: Sequence[Image], config: DataConfig):
        self.images, self.transform = images, test_transform(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(open_rgb(self.images[index].path))


class TrainImages(TestImages):
    """Augmented images with labels, by (index, seed): the seed alone decides the augmentation."""

    def __init__(self, images: Sequence[Image], labels: Sequence[int], config: DataConfig):
        self.images, self.labels, self.transform = images, labels, train_transform(config)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index_and_seed
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return super().__getitem__(index), self.labels[index]


def train_labels(images: Sequence[Image]) -> list[int]:
    """Labels 0..N-1 of training images, in the order of their identities (the same on every rank)."""
    label_of = {identity: label for label, identity in enumerate(sorted({image.identity for image in images}))}
    return [label_of[image.identity] for image in images]


def train_loader(images: Sequence[Image], sampler: Sampler, config: DataConfig, pin_memory: bool) -> DataLoader:
    """Batches (images (B, 3, H, W) float32, labels (B,) int64) in the sampler's order; workers live on over epochs."""
    return DataLoader(
        TrainImages(images, train_labels(images), config),
        batch_sampler=sampler,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=pin_memory,
    )


def test_loader(images: Sequence[Image], batch: int, config: DataConfig) -> DataLoader:
    """Batches (B, 3, H, W) float32 in the order of `images`."""
    return DataLoader(TestImages(images, config), batch_size=batch, num_workers=config.workers)

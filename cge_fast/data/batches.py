"""From images to batches of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from cge_fast.config import DataConfig
from cge_fast.data.images import Image, open_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ERASED_AREA = (0.02, 0.4)  # the paper's parameters of random erasing
ERASED_ASPECT = (0.3, 1 / 0.3)


def to_size(config: DataConfig) -> list[v2.Transform]:
    """Resizes to height x width and makes a uint8 tensor."""
    return [v2.Resize((config.height, config.width), antialias=True), v2.ToImage()]


def normalised() -> list[v2.Transform]:
    """To float32 with ImageNet's mean and deviation."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def train_transform(config: DataConfig) -> v2.Compose:
    """Resize, flip, pad and crop, normalise, random erasing: BagTricks' order. Erased pixels get the mean colour."""
    size = (config.height, config.width)
    return v2.Compose(
        [
            *to_size(config),
            v2.RandomHorizontalFlip(config.flip),
            *([v2.RandomCrop(size, padding=config.pad)] if config.pad else []),
            *normalised(),
            v2.RandomErasing(config.erasing, scale=ERASED_AREA, ratio=ERASED_ASPECT, value=0),
        ]
    )


def test_transform(config: DataConfig) -> v2.Compose:
    """Resize and normalise."""
    return v2.Compose([*to_size(config), *normalised()])


class TrainImages(Dataset):
    """Augmented images with labels, by (index, seed): the seed alone decides the augmentation."""

    def __init__(self, images: Sequence[Image], labels: Sequence[int], config: DataConfig):
        self.images, self.labels = images, labels
        self.transform = train_transform(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index_and_seed
        picture = open_rgb(self.images[index].path)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(picture), self.labels[index]


class TestImages(Dataset):
    """Images as evaluation sees them."""

    def __init__(self, images: Sequence[Image], config: DataConfig):
        self.images = images
        self.transform = test_transform(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(open_rgb(self.images[index].path))


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

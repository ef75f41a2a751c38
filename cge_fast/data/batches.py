"""From images to batches of tensors."""

import math
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
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
SMALLEST_ERASED_AREA = 0.02  # the paper's parameters of random erasing
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_TRIES = 100


def to_size(config: DataConfig) -> list[v2.Transform]:
    """Resizes to height x width and makes a uint8 tensor."""
    interpolation = v2.InterpolationMode(config.interpolation)
    return [v2.Resize((config.height, config.width), interpolation, antialias=True), v2.ToImage()]


def mean_and_std(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of red, green and blue, of values from 0 to 1, that images are normalised with."""
    return NORMALISATIONS[config.normalisation]


def normalised(config: DataConfig) -> list[v2.Transform]:
    """To float32 values from 0 to 1, less their mean, by their standard deviation."""
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*mean_and_std(config))]


def train_transform(config: DataConfig) -> v2.Compose:
    """Resize, change colours, flip, pad and crop, normalise, random erasing: BagTricks' order."""
    size = (config.height, config.width)
    imagenet_mean, _ = NORMALISATIONS["imagenet"]
    black = [-mean / std for mean, std in zip(*mean_and_std(config), strict=True)]
    erased = {"zero": 0, "mean": imagenet_mean, "black": black}[config.erased]
    area = (SMALLEST_ERASED_AREA, config.erasing_area)
    erasing = v2.RandomErasing if config.erasing_aspect == "log_uniform" else UniformErasing
    flip = v2.RandomHorizontalFlip(config.flip)
    crop = [v2.RandomCrop(size, padding=config.pad)] if config.pad else []
    erase = erasing(config.erasing, scale=area, ratio=ERASED_ASPECT, value=erased)
    return v2.Compose([*to_size(config), *colours(config), flip, *crop, *normalised(config), erase])


def colours(config: DataConfig) -> list[v2.Transform]:
    """Colour jitter, with FastReID's strengths, and AutoAugment, each with its probability, of a uint8 image."""
    jitter = v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.1, hue=0.1)
    changes = (config.jitter, jitter), (config.autoaugment, v2.AutoAugment())
    return [v2.RandomApply([change], p=probability) for probability, change in changes if probability]


class UniformErasing(v2.RandomErasing):
    """Random erasing as Zhong, Zheng, Kang, Li, Yang (2020) publish it: the aspect ratio is drawn uniformly.

    Torchvision's draws its logarithm uniformly and tries ten times only, so that wide rectangles, which do not fit an
    upright image, are more frequent there and the erased area is smaller.
    """

    def make_params(self, flat_inputs: list[Tensor]) -> dict:
        """Where and with what the image (3, H, W) is erased; nowhere if no rectangle fits."""
        _, height, width = flat_inputs[0].shape
        for _ in range(ERASING_TRIES):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            aspect = torch.empty(1).uniform_(*self.ratio).item()
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                i, j = (int(torch.randint(free + 1, ())) for free in (height - h, width - w))
                return {"i": i, "j": j, "h": h, "w": w, "v": torch.tensor(self.value)[:, None, None]}
        return {"i": 0, "j": 0, "h": 0, "w": 0, "v": None}


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

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:  # type: ignore[override]
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

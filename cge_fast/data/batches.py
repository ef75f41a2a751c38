"""From images to batches of tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from cge_fast.data.augment import Normalise, draw
from cge_fast.data.decoded import decoded
from cge_fast.data.images import Image
from cge_fast.distributed import rank
from cge_fast.options import DataConfig
from cge_fast.progress import progress

COLOURS = 1 << 62  # of a seed, so that colours are drawn apart from `augment.draw`


def colours(config: DataConfig) -> list[v2.Transform]:
    """Colour jitter, with FastReID's strengths, and AutoAugment, each with its probability, of a uint8 image."""
    jitter = v2.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.1, hue=0.1)
    changes = (config.jitter, jitter), (config.autoaugment, v2.AutoAugment())
    return [v2.RandomApply([change], p=probability) for probability, change in changes if probability]


class TrainImages(Dataset):
    """Images with what is to be done to them and their labels, by (index, seed): the seed alone decides the former."""

    def __init__(self, images: Sequence[Image], labels: Sequence[int], config: DataConfig):
        self.pixels, self.labels, self.config = decoded(images, config), labels, config
        self.colours = v2.Compose(colours(config)) if colours(config) else None

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        index, seed = index_and_seed
        pixels = self.pixels[index]
        if self.colours:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed ^ COLOURS)
                pixels = self.colours(pixels.permute(2, 0, 1)).permute(1, 2, 0).contiguous()
        return pixels, draw(self.config, seed), self.labels[index]


def train_labels(images: Sequence[Image]) -> list[int]:
    """Labels 0..N-1 of training images, in the order of their identities (the same on every rank)."""
    label_of = {identity: label for label, identity in enumerate(sorted({image.identity for image in images}))}
    return [label_of[image.identity] for image in images]


def train_loader(images: Sequence[Image], sampler: Sampler, config: DataConfig, pin_memory: bool) -> DataLoader:
    """Batches (images (B, H, W, 3) uint8, what `augment.draw` gave (B, 7), labels (B,) int64) in the sampler's order.

    Workers live on over epochs.
    """
    return DataLoader(
        TrainImages(images, train_labels(images), config),
        batch_sampler=sampler,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=pin_memory,
    )


def plain_batches(
    images: Sequence, batch: int, config: DataConfig, device: torch.device, name: str, show: bool = True
) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) float32 on the device, in the order of `images`, with a progress bar called `name`.

    images: Image, or with data.cache none whatever `opened` takes.
    """
    normalise = Normalise(config).to(device)
    pinned = device.type == "cuda"
    source: Any = decoded(images, config)  # a Dataset, or a tensor, which serves as one
    loader = DataLoader(source, batch_size=batch, num_workers=config.workers, pin_memory=pinned)
    for pixels in progress(loader, what=name, unit="batches", show=show and rank() == 0):
        yield normalise(pixels.to(device, non_blocking=True))

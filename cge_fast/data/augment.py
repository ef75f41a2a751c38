"""Augmentation: its numbers are drawn for each image from a seed, and applied to batches on their device.

Images are uint8 (B, H, W, 3), as Pillow has them, until here. Then there is one tensor of floats, changed in place, in
rows of W * 3 numbers. On a CPU new memory would take several times as long as all else, since the system maps and
zeroes it page by page: a batch takes that of an earlier one which nobody holds any more.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cge_fast.options import DataConfig

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "luperson": ((0.3525, 0.3106, 0.3140), (0.2505, 0.2522, 0.2504)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
SMALLEST_ERASED_AREA = 0.02  # the paper's parameters of random erasing
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_TRIES = {"uniform": 100, "log_uniform": 10}


def mean_and_std(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of red, green and blue, of values from 0 to 1, that images are normalised with."""
    return NORMALISATIONS[config.normalisation]


def draw(config: DataConfig, seed: int) -> Tensor:
    """What is done to an image: (7,) int64, whether it is flipped, top and left of the crop, and `erased_box`."""
    random = torch.Generator().manual_seed(seed)
    flipped = bool(torch.rand(1, generator=random) < config.flip)
    crop = [int(torch.randint(2 * config.pad + 1, (), generator=random)) for _ in range(2)] if config.pad else [0, 0]
    is_erased = bool(torch.rand(1, generator=random) < config.erasing)
    return torch.tensor([flipped, *crop, *(erased_box(config, random) if is_erased else (0, 0, 0, 0))])


def erased_box(config: DataConfig, random: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of what is erased; all 0 if no rectangle fits.

    The aspect is drawn uniformly as Zhong, Zheng, Kang, Li, Yang (2020) publish it, or its logarithm is as in
    torchvision, which tries ten times only, so that wide rectangles, which do not fit an upright image, are more
    frequent there and the erased area is smaller.
    """

    def uniform(least: float, greatest: float) -> float:
        return torch.empty(1).uniform_(least, greatest, generator=random).item()

    log_aspect = torch.tensor(ERASED_ASPECT).log().tolist()
    for _ in range(ERASING_TRIES[config.erasing_aspect]):
        area = config.height * config.width * uniform(SMALLEST_ERASED_AREA, config.erasing_area)
        if config.erasing_aspect == "uniform":
            aspect = uniform(*ERASED_ASPECT)
        else:
            aspect = torch.tensor(uniform(*log_aspect)).exp().item()
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < config.height and w < config.width:
            free = config.height - h, config.width - w
            top, left = (int(torch.randint(most + 1, (), generator=random)) for most in free)
            return top, left, h, w
    return 0, 0, 0, 0


class Normalise(nn.Module):
    """Images to float32 values from 0 to 1, less their mean, by their standard deviation."""

    mean: Tensor  # (3,), and so is the next
    std: Tensor

    def __init__(self, config: DataConfig):
        super().__init__()
        for name, values in zip(("mean", "std"), mean_and_std(config), strict=True):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.kept: list[torch.UntypedStorage] = []  # a loop holds one batch while it makes the next

    def rows(self, images: Tensor) -> Tensor:
        """(B, H, W * 3) float32 of uint8 images (B, H, W, 3)."""
        return self.normalised(self.empty(images.flatten(2)).copy_(images.flatten(2)))

    def normalised(self, rows: Tensor) -> Tensor:
        """Rows (..., W * 3) float32 of values from 0 to 255, changed in place."""
        width = rows.shape[-1] // 3
        return rows.mul_(1 / 255).sub_(self.mean.repeat(width)).div_(self.std.repeat(width))

    def empty(self, like: Tensor) -> Tensor:
        """An uninitialised float32 tensor of the same shape and device."""
        if like.device.type != "cpu":
            return torch.empty_like(like, dtype=torch.float32)
        for storage in self.kept:
            if torch._C._storage_Use_Count(storage._cdata) == 1 and storage.nbytes() == 4 * like.numel():
                return torch.empty(0).set_(storage, 0, like.shape)  # type: ignore[call-overload]
        fresh = torch.empty(like.shape)
        self.kept = [*self.kept[-1:], fresh.untyped_storage()]
        return fresh

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32, in memory as channels_last, of uint8 images (B, H, W, 3)."""
        return self.rows(images).view(images.shape).permute(0, 3, 1, 2)


class Augment(Normalise):
    """Flip, pad and crop, normalise, random erasing: BagTricks' order. The host never waits for the device."""

    erased: Tensor  # (3,)

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self.pad = config.pad
        black = [-mean / std for mean, std in zip(*mean_and_std(config), strict=True)]
        erased = {"zero": [0.0] * 3, "mean": NORMALISATIONS["imagenet"][0], "black": black}[config.erased]
        self.register_buffer("erased", torch.tensor(erased), persistent=False)

    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:  # type: ignore[override]
        """As Normalise's, of images to each of which is done what `draw` gave, (B, 7)."""
        return (self.one_by_one if images.device.type == "cpu" else self.all_at_once)(images, drawn)

    def all_at_once(self, images: Tensor, drawn: Tensor) -> Tensor:
        """On a GPU: in as few launches as that takes."""
        batch, height, width, _ = images.shape
        flipped, y, x, top, left, h, w = drawn[:, :, None].unbind(1)
        number, row, column = (torch.arange(size, device=images.device) for size in (batch, height, width))
        x = x + column
        x = torch.where(flipped > 0, width + 2 * self.pad - 1 - x, x)
        byte = (3 * x[:, :, None] + torch.arange(3, device=x.device)).flatten(1)[:, None].expand(-1, height, -1)
        padded = pad(images, [0, 0] + [self.pad] * 4).flatten(2)
        rows = self.rows(padded[number[:, None], y + row].gather(2, byte).view(images.shape))
        in_row, in_column = (row >= top) & (row < top + h), (column >= left) & (column < left + w)
        is_erased = in_row[:, :, None] & in_column[:, :, None].expand(-1, -1, 3).flatten(1)[:, None]
        torch.where(is_erased, self.erased.repeat(width), rows, out=rows)
        return rows.view(images.shape).permute(0, 3, 1, 2)

    def one_by_one(self, images: Tensor, drawn: Tensor) -> Tensor:
        """On a CPU: an image stays in the cache from its crop to its erasing."""
        height, width = images.shape[1:3]
        result = self.empty(images)
        padded = pad(images, [0, 0] + [self.pad] * 4)
        for image, out, (flipped, y, x, top, left, h, w) in zip(padded, result, drawn.tolist(), strict=True):
            x = 2 * self.pad - x if flipped else x
            crop = image[y : y + height, x : x + width]
            out.copy_(crop.flip(1) if flipped else crop)
            self.normalised(out.flatten(1))
            out[top : top + h, left : left + w] = self.erased
        return result.permute(0, 3, 1, 2)

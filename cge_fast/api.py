"""A trained network in another program: `cge_fast.load("runs/mine").embed(["a.jpg", "b.jpg"])`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from cge_fast import checkpoint
from cge_fast.build import NO_VARIANTS, load_model
from cge_fast.cli import read_settings
from cge_fast.data.augment import Normalise
from cge_fast.data.batches import plain_batches
from cge_fast.evaluation.features import features
from cge_fast.model import ReidModel
from cge_fast.options import DataConfig, EvaluationConfig, TrainConfig


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's network in evaluation mode, which records no gradients."""

    folder: Path  # of the checkpoint
    model: ReidModel
    config: TrainConfig  # `data` and `evaluation` say how images are read and compared, the rest is the training's

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.model.neck.weight.device

    @property
    def names(self) -> dict[str, list[str]]:
        """Of the training's `identities`, in the order of the classes, and `cameras`; empty of a set without names."""
        return checkpoint.names(self.folder)

    def embed(
        self,
        images: Sequence[str | Path | PIL.Image.Image | np.ndarray] | np.ndarray | Tensor,
        batch: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Features (N, C) float32 on the network's device, as the evaluation compares them.

        They are those after or before BNNeck, of the image or the mean with its mirror image's, as `config.evaluation`
        says, and not of unit length: for the metric cosine divide each by its norm.

        Args:
            images: N images in RGB, of any size; they are resized to config.data's height and width, and normalised.
                A sequence of paths, Pillow images and arrays (H, W, 3) uint8, also mixed; an array (N, H, W, 3) uint8;
                or a tensor (N, 3, H, W), uint8 from 0 to 255 or floating from 0 to 1. The same pixels as files, Pillow
                images and arrays give the same bits (but for JPEGs of many times the size, which files are decoded
                smaller of); a tensor of another size than the network's is resized by PyTorch, whose values differ
                from Pillow's by up to a grey level.
            batch: images in a forward pass; by default config.evaluation.batch. If there are more images,
                config.data.workers processes read them.
            progress: draw a progress bar; not of a tensor's.

        Raises:
            UserError: a file cannot be read.
            TypeError, ValueError: an image is of another type, shape or range.
        """
        batch = batch or self.config.evaluation.batch
        if isinstance(images, Tensor):
            batches = tensor_batches(images, batch, self.config.data)
        elif isinstance(images, str | Path | PIL.Image.Image):
            raise TypeError(f"images must be a sequence (of one image, [image]), got {type(images).__name__}")
        else:
            images = list(images)
            workers = self.config.data.workers if len(images) > batch else 0
            data = replace(self.config.data, cache="none", workers=workers)
            batches = plain_batches(images, batch, data, self.device, "embedding images", progress)
        return features(self.model, batches, self.config.evaluation)


def load(
    folder: Path | str,
    device: torch.device | str | None = None,
    data: DataConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    variants: Mapping[str, type[nn.Module]] = NO_VARIANTS,
) -> TrainedModel:
    """Opens a trained network.

    Args:
        folder: of a checkpoint, like runs/mine/checkpoints/last, or of a run, whose last checkpoint it then is.
        device: where to compute; by default the GPU if there is one.
        data: how to read images; by default as in the training.
        evaluation: how to compare features; by default as in the training.
        variants: losses whose model is wanted instead of the deployed one: see `build_run`.

    Raises:
        UserError: the folder is no checkpoint, or does not fit the settings.
    """
    folder = checkpoint.opened(folder)
    trained = read_settings(checkpoint.config_file(folder))
    config = replace(trained, data=data or trained.data, evaluation=evaluation or trained.evaluation)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(folder, trained, config.data, device, variants)
    return TrainedModel(folder, model.eval().requires_grad_(False), config)


def tensor_batches(images: Tensor, batch: int, config: DataConfig) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) float32, resized and normalised, of images (N, 3, H', W') on any device."""
    if images.dim() != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        got = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
        raise ValueError(f"images must be (N, 3, H, W), uint8 or floating, got {got}")
    resize = v2.Resize((config.height, config.width), v2.InterpolationMode(config.interpolation), antialias=True)
    normalise = Normalise(config).to(images.device)
    for part in images.split(batch):
        if part.is_floating_point():
            if not ((part >= 0) & (part <= 1)).all():
                raise ValueError("images that are floating must be from 0 to 1, not normalised; uint8 is from 0 to 255")
            part = part.float() * 255
        yield normalise(resize(part).permute(0, 2, 3, 1))

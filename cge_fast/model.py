"""The network that is deployed: backbone, pooling and BNNeck. What trains it are the losses."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from cge_kernels import backend, stripe_pool

GEM_INITIAL_P = 3.0


class AtLeastFloat32(nn.Module):
    """Keeps its parameters and buffers as they are where `.half()` or `.to(dtype)` would make them smaller."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.is_floating_point() and result.itemsize < 4 else result

        return super()._apply(apply, recurse)


class FrozenParameter(nn.Parameter):
    """Never learns: `requires_grad` stays False, even after `requires_grad_(True)` over the whole model."""

    requires_grad = property(lambda self: False, lambda self, value: None)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Nothing."""
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple:  # else it would come back as an ordinary parameter
        return FrozenParameter, (self.data, False)


class Embeddings(NamedTuple):
    """What the network gives of a batch; B batch, C channels, n stripes."""

    pooled: Tensor  # (B, C) float32, before BNNeck: what metric losses take
    stripes: Tensor  # (B, n, C) float32: the paper's local features
    embedding: Tensor  # (B, C) float32, after BNNeck: what classification losses take, and retrieval


class StripePool(AtLeastFloat32):
    """Pooling of a feature map into a global feature and n stripe features (the input of the paper's NLC).

    Args:
        stripes: n, horizontal stripes; at most the map's height.
        gem: generalised mean with one learnable exponent `p`; else the average, and `p` is None.
    """

    def __init__(self, stripes: int = 3, gem: bool = True):
        super().__init__()
        if stripes < 1:
            raise ValueError(f"stripes must be at least 1, got {stripes}")
        self.stripes = stripes
        self.p = nn.Parameter(torch.tensor(GEM_INITIAL_P)) if gem else None

    def forward(self, feature_map: Tensor, stripes: int | None = None) -> tuple[Tensor, Tensor]:
        """Global feature (B, C) and stripe features (B, n, C), float32, of a feature map (B, C, H, W).

        stripes: another number of stripes than the module's.
        """
        # What is exported or traced has PyTorch's own operators alone, and runs without this package.
        plain = torch.compiler.is_exporting() or torch.jit.is_tracing()
        with backend("reference") if plain else nullcontext():
            return stripe_pool(feature_map, stripes or self.stripes, self.p)


class BNNeck(AtLeastFloat32, nn.BatchNorm1d):
    """BagTricks' BatchNorm with a frozen zero bias, between pooled feature and embedding.

    `num_batches_tracked`, which nothing depends on, is brought up to date when it is saved, without a launch in each
    step; it counts neither compiled nor captured steps.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int):
        super().__init__(channels)
        self.bias = FrozenParameter(self.bias, requires_grad=False)
        self.not_yet_tracked = 0

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, C) of pooled features (B, C).

        Raises:
            ValueError: one sample alone in training, which has no variance.
        """
        if self.training and pooled.shape[0] == 1:
            raise ValueError(
                "BNNeck: needs 2 samples or more in training, got 1; drop_last=True leaves out such a batch"
            )
        if self.training and not torch.compiler.is_compiling():
            self.__dict__["not_yet_tracked"] += 1  # a module's own assignment takes the host as long as a launch
        statistics = self.running_mean, self.running_var
        return batch_norm(pooled, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.num_batches_tracked += self.not_yet_tracked
        self.not_yet_tracked = 0
        super()._save_to_state_dict(*arguments)


class ReidModel(nn.Module):
    """Backbone, pooling and BNNeck; the backbone computes in `precision` and channels_last, the rest in float32.

    Args:
        backbone: from images (B, 3, H, W) to a feature map (B, C, H', W').
        channels: C.
        stripes: n, horizontal stripes of the feature map.
        gem: generalised-mean pooling instead of the average.
        precision: of the backbone's arithmetic.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        stripes: int = 3,
        gem: bool = True,
        precision: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.pool, self.neck = StripePool(stripes, gem), BNNeck(channels)
        self.precision = precision

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, H', W') of images (B, 3, H, W)."""
        lower = self.precision != torch.float32
        with torch.autocast(images.device.type, self.precision if lower else None, enabled=lower):
            return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Embeddings:
        """What the losses take, of images (B, 3, H, W)."""
        pooled, stripes = self.pool(self.feature_map(images))
        return Embeddings(pooled, stripes, self.neck(pooled))

    def embed(self, images: Tensor, after_neck: bool = True) -> Tensor:
        """The feature (B, C) that retrieval compares, after BNNeck or before it; no stripe is pooled."""
        pooled, _ = self.pool(self.feature_map(images), stripes=1)
        return self.neck(pooled) if after_neck else pooled

"""Pooling, BNNeck and CGELoss in one module, for a training loop of your own."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cge_fast.losses.cge import CGELoss
from cge_fast.model import BNNeck, Embeddings, StripePool


class HeadOutput(NamedTuple):
    """The fields of LossOutput and Embeddings; `stripes` is detached, for `write_memory`."""

    loss: Tensor
    correct: Tensor
    stripe_correct: Tensor
    pooled: Tensor
    embedding: Tensor
    stripes: Tensor


class CGEHead(nn.Module):
    """Comprehensive Global Embedding on top of any backbone.

    Training: `out = head(feature_map, labels)`, then `out.loss.backward()`, `optimizer.step()` and
    `head.write_memory(out.stripes, labels, momentum)`. In use: `head(feature_map)` is the embedding.
    The arguments are those of StripePool and CGELoss. It computes in float32, but for memory_dtype, also in a network
    that is cast to another dtype. Exported or traced, it has PyTorch's own operators alone.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stripes: int = 3,
        gem: bool = True,
        label_smoothing: float = 0.1,
        memory_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.pool, self.neck = StripePool(stripes, gem), BNNeck(in_channels)
        self.loss = CGELoss(in_channels, num_classes, stripes, label_smoothing, memory_dtype=memory_dtype)

    def forward(self, feature_map: Tensor, labels: Tensor | None = None) -> HeadOutput | Tensor:
        """The training output of a feature map (B, C, H, W) and labels (B,); without labels the embedding (B, C).

        Raises:
            ValueError, TypeError: shapes, dtypes or labels do not fit; the message names the argument.
        """
        if labels is None:
            return self._embeddings(feature_map, stripes=1).embedding
        embeddings = self._embeddings(feature_map)
        out = self.loss(embeddings, labels)
        pooled, stripes, embedding = embeddings
        return HeadOutput(out.loss, out.correct, out.stripe_correct, pooled, embedding, stripes.detach())

    def revised_logits(self, feature_map: Tensor) -> tuple[Tensor, Embeddings]:
        """For a loop that computes its own losses: the revised logits (B, N) float32, and what they were computed of.

        `embeddings.pooled` (B, C) is what metric losses take; `embeddings.stripes` go to `write_memory`.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        embeddings = self._embeddings(feature_map)
        return self.loss.revised_logits(embeddings), embeddings

    def _embeddings(self, feature_map: Tensor, stripes: int | None = None) -> Embeddings:
        channels = self.neck.num_features
        if feature_map.dim() != 4 or feature_map.shape[1] != channels:
            raise ValueError(f"feature_map must have shape (B, {channels}, H, W), got {tuple(feature_map.shape)}")
        pooled, of_stripes = self.pool(feature_map, stripes)
        return Embeddings(pooled, of_stripes, self.neck(pooled))

    def write_memory(self, stripes: Tensor, labels: Tensor, momentum: float) -> None:
        """See CGELoss.write_memory; call it after `optimizer.step()`."""
        self.loss.write_memory(stripes, labels, momentum)

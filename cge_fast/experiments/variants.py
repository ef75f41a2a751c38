"""The paper's ablations and the controls as losses: python -m cge_fast.experiments.variants --help

The program is cge_fast.train, where --loss.variant NAME puts a loss of VARIANTS in CGELoss's or SoftmaxLoss's place.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, cross_entropy, linear, log_softmax, normalize

from cge_fast import errors
from cge_fast.errors import UserError
from cge_fast.losses.cge import CGELoss, label_and_mean_weight
from cge_fast.losses.softmax import LossOutput, SoftmaxLoss, linear_float32, valid_targets
from cge_fast.model import Embeddings, ReidModel
from cge_kernels import revise_logits, stripe_correct

PROGRAM = "cge_fast.experiments.variants"
FOCAL_ALPHA, FOCAL_GAMMA = 0.5, 1.0  # the CGE paper's
SPHERE_MARGIN = 4  # m: SphereFace's and the CGE paper's


def focal_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-alpha * (1 - q)^gamma * log q, (B,), q the softmax probability of the label (Lin et al. 2017).

    logits (B, N), floating; labels (B,), int64.
    """
    log_q = log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    return -FOCAL_ALPHA * (1 - log_q.exp()) ** FOCAL_GAMMA * log_q


def sphere_logits(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, N) of SphereFace (Liu et al. 2017): |x| cos(theta_k), and |x| psi(theta_k) for the label.

    theta_k is the angle between the feature x and class k's row; psi(theta) = (-1)^j cos(m theta) - 2j with
    j = floor(m theta / pi), m = 4. features (B, C) and weight (N, C), floating; labels (B,), int64.
    """
    cosine = linear(normalize(features), normalize(weight))
    own = cosine.gather(1, labels[:, None])
    with torch.no_grad():
        turns = (SPHERE_MARGIN * own.clamp(-1, 1).acos() / math.pi).floor()
    multiple_angle = 8 * own**4 - 8 * own**2 + 1  # cos(4 theta)
    psi = torch.where(turns % 2 == 0, multiple_angle, -multiple_angle) - 2 * turns
    return features.norm(dim=1, keepdim=True) * cosine.scatter(1, labels[:, None], psi)


class Scaled:
    """Before a loss: its logits times `scale`; revision itself multiplies logits by 0.5 to 0.73."""

    def __init__(self, *arguments: Any, scale: float = 1.0, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.scale = scale

    def forward(self, embeddings: Embeddings, labels: Tensor) -> LossOutput:
        return super().forward(embeddings._replace(embedding=embeddings.embedding * self.scale), labels)

    def revised_logits(self, embeddings: Embeddings) -> Tensor:
        return super().revised_logits(embeddings._replace(embedding=embeddings.embedding * self.scale))


class Detached:
    """Before a CGELoss: no gradient flows through the revision's weights to the backbone."""

    def forward(self, embeddings: Embeddings, labels: Tensor) -> LossOutput:
        return super().forward(embeddings._replace(stripes=embeddings.stripes.detach()), labels)


class InSteps:
    """Before a CGELoss or SoftmaxLoss: the same loss in steps that a variant can change."""

    def forward(self, embeddings: Embeddings, labels: Tensor) -> LossOutput:
        valid, targets = valid_targets(labels, len(embeddings.embedding), self.num_classes)
        logits = self.revised(self.logits(embeddings, targets), embeddings)
        loss = torch.where(valid, self.losses(logits, targets), torch.nan).mean()
        memory = getattr(self, "memory_read", None)
        local = None if memory is None else stripe_correct(embeddings.stripes.detach(), memory, labels)
        return LossOutput(loss, logits.argmax(dim=1) == labels, local)

    def revised_logits(self, embeddings: Embeddings) -> Tensor:
        """(B, N), without a margin."""
        return self.revised(self.logits(embeddings, None), embeddings)

    def logits(self, embeddings: Embeddings, targets: Tensor | None) -> Tensor:
        """(B, N) before revision; targets (B,) int64 say where a margin is set."""
        return linear_float32(embeddings.embedding, self.weight)

    def revised(self, logits: Tensor, embeddings: Embeddings) -> Tensor:
        """The logits (B, N) after revision."""
        return revise_logits(logits, embeddings.stripes, self.memory_read) if hasattr(self, "memory") else logits

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of each sample, (B,)."""
        return cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)


class Focal(InSteps):
    """Focal loss, which knows no label smoothing."""

    losses = staticmethod(focal_losses)


class Sphere(InSteps):
    """Cross entropy of SphereFace's logits."""

    def logits(self, embeddings: Embeddings, targets: Tensor | None) -> Tensor:
        if targets is None:
            return super().logits(embeddings, targets)
        with torch.autocast(embeddings.embedding.device.type, enabled=False):
            return sphere_logits(embeddings.embedding, self.weight, targets)


class Shuffled(InSteps):
    """A control: class k is revised by another class's rows, while `stripe_correct` is of the true ones."""

    def __init__(self, in_channels: int, num_classes: int, **keywords: Any):
        if num_classes < 2:
            raise ValueError(f"a shuffled memory needs at least 2 classes, got {num_classes}")
        super().__init__(in_channels, num_classes, **keywords)
        # A rotation of a random order has no fixed point; the same for every seed, so that a resumed run has it too.
        order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(0))
        self.register_buffer("shuffled", order.roll(1)[order.argsort()], persistent=False)

    @property
    def revising_memory(self) -> Tensor:
        """The memory (n, N, C) that revises: another class's rows for each class."""
        return self.memory_read[:, self.shuffled]

    def revised(self, logits: Tensor, embeddings: Embeddings) -> Tensor:
        return revise_logits(logits, embeddings.stripes, self.revising_memory)

    def label_and_mean_weight(self, stripes: Tensor, labels: Tensor) -> Tensor:
        return label_and_mean_weight(stripes, self.revising_memory, labels)


class MapEmbeddings(NamedTuple):
    """Embeddings, and the rows of the map whose mean is the embedding."""

    pooled: Tensor
    stripes: Tensor
    embedding: Tensor
    rows: Tensor  # (B, H, C) float32, after BNNeck


class MapModel(ReidModel):
    """A ReidModel whose BNNeck normalises the positions of the map in training; in use, the embedding is the same."""

    def __init__(self, backbone: nn.Module, channels: int, stripes: int, gem: bool, precision: torch.dtype):
        if gem:
            raise UserError("loss.variant: revised_maps averages the classifier's maps: it needs model.pooling average")
        super().__init__(backbone, channels, stripes, gem, precision)

    def forward(self, images: Tensor) -> MapEmbeddings:
        feature_map = self.feature_map(images)
        pooled, stripes = self.pool(feature_map)
        batch, channels, height, width = feature_map.shape
        positions = feature_map.permute(0, 2, 3, 1).reshape(-1, channels).float()
        rows = self.neck(positions).view(batch, height, width, channels).mean(dim=2)
        return MapEmbeddings(pooled, stripes, rows.mean(dim=1), rows)


class RevisedMaps(InSteps, CGELoss):
    """The classifier as a 1x1 convolution: the rows of stripe i of its N maps are multiplied by sigmoid(s_i[k])."""

    model_class = MapModel

    def logits(self, embeddings: MapEmbeddings, targets: Tensor | None) -> Tensor:
        return linear_float32(embeddings.rows, self.weight)  # (B, H, N): it commutes with the average over a row

    def revised(self, logits: Tensor, embeddings: MapEmbeddings) -> Tensor:
        stripes, (batch, height, _) = embeddings.stripes.split(1, dim=1), logits.shape
        ones = logits.new_ones(batch, self.num_classes)  # of one stripe's memory revision gives sigmoid(s_i)
        weights = [revise_logits(ones, *of_one) for of_one in zip(stripes, self.memory_read.split(1), strict=True)]
        # Stripes may overlap: a row's shares of the stripes that it belongs to add up to 1.
        belongs = (adaptive_avg_pool1d(torch.eye(height, device=logits.device)[None], len(stripes))[0] > 0).float()
        shares = belongs / belongs.sum(dim=1, keepdim=True)
        return torch.einsum("ibk,hi,bhk->bk", torch.stack(weights), shares, logits) / height


class MemoryNotUsed(InSteps, CGELoss):
    """The memory is written and its precision measured, but the logits stay as they are."""

    def revised(self, logits: Tensor, embeddings: Embeddings) -> Tensor:
        return logits


class BFloat16Memory(CGELoss):
    """The loss as a GPU computes it in bfloat16, on any device."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords | {"memory_dtype": torch.bfloat16})


VARIANTS: dict[str, type[nn.Module]] = {
    "memory_not_used": MemoryNotUsed,
    "revised_maps": RevisedMaps,
    "bfloat16_memory": BFloat16Memory,
} | {
    name: type(name, parts, {})
    for name, parts in {
        "scaled": (Scaled, InSteps, SoftmaxLoss),
        "focal": (Scaled, Focal, SoftmaxLoss),
        "sphere": (Scaled, Sphere, SoftmaxLoss),
        "cge_scaled": (Scaled, CGELoss),
        "detached_weights": (Detached, CGELoss),
        "shuffled_memory": (Shuffled, CGELoss),
        "cge_focal": (Scaled, Focal, CGELoss),
        "cge_focal_detached_weights": (Detached, Focal, CGELoss),
        "cge_focal_shuffled_memory": (Shuffled, Focal, CGELoss),
        "cge_sphere": (Scaled, Sphere, CGELoss),
        "cge_sphere_detached_weights": (Detached, Sphere, CGELoss),
        "cge_sphere_shuffled_memory": (Shuffled, Sphere, CGELoss),
    }.items()
}


def main(arguments: Sequence[str] | None = None) -> None:
    """cge_fast.train with these variants; `arguments` default to the command line's."""
    from cge_fast import train

    train.main(arguments, VARIANTS)


if __name__ == "__main__":
    errors.run(main, PROGRAM)

"""The paper's ablations and the controls as losses: python -m cge_fast.experiments.variants --help

The program is cge_fast.train, where --loss.variant NAME puts a loss of VARIANTS in CGELoss's or SoftmaxLoss's place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from cge_fast import errors
from cge_fast.errors import UserError
from cge_fast.losses.cge import CGELoss, label_and_mean_weight
from cge_fast.losses.softmax import LossOutput, SoftmaxLoss, linear_float32, valid_targets
from cge_fast.model import Embeddings, ReidModel
from cge_kernels import revise_logits, stripe_correct

PROGRAM = "cge_fast.experiments.variants"
FOCAL_ALPHA, FOCAL_GAMMA = 0.5, 1.0  # the CGE paper's


def focal_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-alpha * (1 - q)^gamma * log q, (B,), q the softmax probability of the label (Lin et al. 2017).

    logits (B, N), floating; labels (B,), int64.
    """
    log_q = log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    return -FOCAL_ALPHA * (1 - log_q.exp()) ** FOCAL_GAMMA * log_q


class Scaled:
    """Before a loss in steps: its logits times `scale`; revision itself multiplies logits by 0.5 to 0.73."""

    def __init__(self, *arguments: Any, scale: float = 1.0, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.scale = scale

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
        logits = self.revised_logits(embeddings)
        loss = torch.where(valid, self.losses(logits, targets), torch.nan).mean()
        memory = getattr(self, "memory_read", None)
        local = None if memory is None else stripe_correct(embeddings.stripes.detach(), memory, labels)
        return LossOutput(loss, logits.argmax(dim=1) == labels, local)

    def revised_logits(self, embeddings: Embeddings) -> Tensor:
        """(B, N) float32."""
        logits = linear_float32(embeddings.embedding, self.weight)
        return revise_logits(logits, embeddings.stripes, self.memory_read) if hasattr(self, "memory") else logits

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of each sample, (B,)."""
        return cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)


class Focal(InSteps):
    """Focal loss, which knows no label smoothing."""

    losses = staticmethod(focal_losses)


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

    def revised_logits(self, embeddings: Embeddings) -> Tensor:
        logits = linear_float32(embeddings.embedding, self.weight)
        return revise_logits(logits, embeddings.stripes, self.revising_memory)

    def label_and_mean_weight(self, stripes: Tensor, labels: Tensor) -> Tensor:
        return label_and_mean_weight(stripes, self.revising_memory, labels)


class FeatureModel(ReidModel):
    """A ReidModel without BNNeck, whose embedding is the pooled feature; `neck` stays the identity."""

    def __init__(self, backbone: nn.Module, channels: int, stripes: int, gem: bool, precision: torch.dtype):
        if gem:
            raise UserError("loss.variant: feature averages the classifier's maps: it needs model.pooling average")
        super().__init__(backbone, channels, stripes, gem, precision)
        self.neck.requires_grad_(False)

    def forward(self, images: Tensor) -> Embeddings:
        pooled, stripes = self.pool(self.feature_map(images))
        return Embeddings(pooled, stripes, pooled)


class Feature:
    """Before a loss: a 1x1 convolution makes N maps of the feature map, w_k multiplies map k, the average is its logit.

    Convolution, weight and average commute: the logit is w_k times the classifier's of the averaged feature map.
    """

    model_class = FeatureModel


class MemoryNotUsed(InSteps, CGELoss):
    """The memory is written and its precision measured, but the logits stay as they are."""

    def revised_logits(self, embeddings: Embeddings) -> Tensor:
        return linear_float32(embeddings.embedding, self.weight)


class BFloat16Memory(CGELoss):
    """The loss as a GPU computes it in bfloat16, on any device."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords | {"memory_dtype": torch.bfloat16})


VARIANTS: dict[str, type[nn.Module]] = {"memory_not_used": MemoryNotUsed, "bfloat16_memory": BFloat16Memory} | {
    name: type(name, parts, {})
    for name, parts in {
        "scaled": (Scaled, InSteps, SoftmaxLoss),
        "focal": (Scaled, Focal, SoftmaxLoss),
        "feature": (Feature, SoftmaxLoss),
        "cge_scaled": (Scaled, InSteps, CGELoss),
        "cge_focal": (Scaled, Focal, CGELoss),
        "cge_feature": (Feature, CGELoss),
        "detached_weights": (Detached, CGELoss),
        "shuffled_memory": (Shuffled, CGELoss),
    }.items()
}


def main(arguments: Sequence[str] | None = None) -> None:
    """cge_fast.train with these variants; `arguments` default to the command line's."""
    from cge_fast import train

    train.main(arguments, VARIANTS)


if __name__ == "__main__":
    errors.run(main, PROGRAM)

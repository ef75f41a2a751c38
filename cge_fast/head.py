"""The CGE head: a feature map goes in; out come the loss in training and the embedding in use."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cge_fast.distributed import gather
from cge_fast.operators import Kernels, local_hits, operators, require_shape, require_tensor, valid_labels

GEM_INITIAL_P = 3.0
CLASSIFIER_STD = 0.001  # BagTricks' initialisation of the classifier
CONSTANT_ALPHA = 0.01

Pooling = Literal["average", "gem"]
Alpha = Literal["linear", "exponential", "constant"]


class HeadOutput(NamedTuple):
    """What a training forward returns; B batch, C channels, n stripes."""

    loss: Tensor  # 0-d: mean cross entropy of the revised logits over the batch
    global_feature: Tensor  # (B, C) float32, before BNNeck: what metric losses take
    embedding: Tensor  # (B, C) float32, after BNNeck
    local_features: Tensor | None  # (B, n, C) float32, detached: what write_memory takes; None without CGE
    hit: Tensor  # (B,) bool: the revised logits' arg max is the label
    local_hit: Tensor | None  # (B, n) bool: stripe i's arg max is the label; None without CGE


def memory_alpha(strategy: Alpha, epoch: int, epochs: int) -> float:
    """How much of an old memory row stays, for epoch t = 1..E.

    linear t/E; exponential exp(-5 * ((1-t)/E)^2), as the paper prints it; constant 0.01.
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch must lie between 1 and {epochs}, got {epoch}")
    match strategy:
        case "linear":
            return epoch / epochs
        case "exponential":
            return math.exp(-5 * ((1 - epoch) / epochs) ** 2)
        case "constant":
            return CONSTANT_ALPHA


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean label-smoothed cross entropy, 0-d, and hits (B,) of logits (B, N).

    Labels are checked and masked as in `revised_cross_entropy`: outside [0, N) they are a ValueError on the CPU, a NaN
    loss on a GPU.
    """
    require_tensor("labels", labels, "(B,)", "an integer")
    require_shape("labels", labels, (len(logits),), f"logits {tuple(logits.shape)}")
    valid = valid_labels(labels, logits.shape[1])  # if nobody took the mask, torch.compile would drop the check
    targets = torch.where(valid, labels, 0).long()
    loss = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return torch.where(valid, loss, torch.nan).mean(), logits.argmax(dim=1) == labels


class CGEHead(nn.Module):
    """Comprehensive Global Embedding on top of any backbone: pooling, BNNeck, classifier, local memory and loss.

    Training: `out = head(feature_map, labels)`, then `out.loss.backward()`, `optimizer.step()` and
    `head.write_memory(out.local_features, labels, epoch)`. In use: `head(feature_map)` is the embedding.

    Args:
        in_channels: C, channels of the feature map.
        num_classes: N, identities in training.
        epochs: E, epochs in all; the memory's alpha depends on it.
        stripes: n, horizontal stripes of the feature map; at most its height.
        pooling: "average", or "gem" with one learnable exponent for the global and the stripe features.
        alpha: how much of a memory row a write keeps: "linear", "exponential" or "constant" (`memory_alpha`).
        cge: False leaves out memory, stripes and revision: the BagTricks baseline.
        label_smoothing: e of the target (1-e) * onehot + e/N.
        logit_scale: factor of the logits, 1 in the paper. Revision itself multiplies logits by 0.5 to 0.73, so a
            baseline with a smaller scale is the fair comparison.
        local_gradient: False detaches the revision's weights from the backbone.
        kernels: "fused", the operators of cge_kernels; "one_pass", the same with pooling and revision in one launch,
            which here reads the map a second time; "reference", those of cge_reference.

    Raises:
        ValueError: a number is out of range or a name unknown.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        epochs: int,
        stripes: int = 3,
        pooling: Pooling = "gem",
        alpha: Alpha = "linear",
        cge: bool = True,
        label_smoothing: float = 0.1,
        logit_scale: float = 1.0,
        local_gradient: bool = True,
        kernels: Kernels = "fused",
    ):
        super().__init__()
        sizes = {"in_channels": in_channels, "num_classes": num_classes, "epochs": epochs, "stripes": stripes}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        choices = (("pooling", pooling, Pooling), ("alpha", alpha, Alpha), ("kernels", kernels, Kernels))
        for name, value, known in choices:
            if value not in known.__args__:
                raise ValueError(f"{name} must be one of {', '.join(known.__args__)}, got {value!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.epochs, self.alpha, self.cge, self.kernels = epochs, alpha, cge, kernels
        self.stripes = stripes if cge else 1
        self.label_smoothing, self.logit_scale, self.local_gradient = label_smoothing, logit_scale, local_gradient
        self.p = nn.Parameter(torch.tensor(GEM_INITIAL_P)) if pooling == "gem" else None
        self.neck = nn.BatchNorm1d(in_channels)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(in_channels, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=CLASSIFIER_STD)
        self.register_buffer("memory", torch.zeros(stripes, num_classes, in_channels) if cge else None)

    def forward(self, feature_map: Tensor, labels: Tensor | None = None) -> HeadOutput | Tensor:
        """The training output with labels, the embedding without.

        Args:
            feature_map: (B, C, H, W), floating.
            labels: (B,), integer, in [0, N); or None.

        Returns:
            HeadOutput, or without labels the embedding (B, C) float32, after BNNeck.

        Raises:
            ValueError, TypeError: shapes, dtypes or labels do not fit; the message names the argument.
        """
        if labels is None:
            return self.embed(feature_map)
        if self.cge and self.kernels != "one_pass":
            return self._forward_fused(feature_map, labels)
        global_feature = self.embed(feature_map, after_neck=False)
        embedding = self._normalise(global_feature)
        logits, local_features, local_hit = self._logits(embedding), None, None
        if self.cge:
            logits, local_features = self._revise_in_one_pass(feature_map, logits)
            local_features = local_features.detach()
        loss, hit = smoothed_cross_entropy(logits, labels, self.label_smoothing)
        if self.cge:
            local_hit = local_hits(local_features, self.memory, labels)
        return HeadOutput(loss, global_feature, embedding, local_features, hit, local_hit)

    def _forward_fused(self, feature_map: Tensor, labels: Tensor) -> HeadOutput:
        """Training with CGE, where the loss takes the features: `revised_cross_entropy`."""
        global_feature, local_features = self.pool(feature_map)
        embedding = self._normalise(global_feature)
        loss, hit, local_hit = operators(self.kernels).revised_cross_entropy(
            embedding * self.logit_scale,
            self.classifier.weight,
            local_features,
            self.memory,
            labels,
            self.label_smoothing,
            self.local_gradient,
        )
        return HeadOutput(loss.mean(), global_feature, embedding, local_features.detach(), hit, local_hit)

    def _revise_in_one_pass(self, feature_map: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Revised logits (B, N) and local features (B, n, C) in one launch."""
        return operators(self.kernels).revise_logits_one_pass(
            feature_map, logits, self.memory, self.p, local_gradient=self.local_gradient
        )

    def embed(self, feature_map: Tensor, after_neck: bool = True) -> Tensor:
        """The global feature (B, C) float32 of a feature map (B, C, H, W), after BNNeck or before it."""
        global_feature, _ = operators(self.kernels).stripe_pool(feature_map, 1, self.p)
        return self._normalise(global_feature) if after_neck else global_feature

    def revise(self, feature_map: Tensor) -> Tensor:
        """Revised logits (B, N) float32 of a feature map (B, C, H, W), for losses other than cross entropy.

        What write_memory then takes: `_, local_features = head.pool(feature_map.detach())`.
        """
        if not self.cge or self.kernels == "one_pass":
            logits = self._logits(self.embed(feature_map))
            return self._revise_in_one_pass(feature_map, logits)[0] if self.cge else logits
        global_feature, local_features = self.pool(feature_map)
        logits = self._logits(self._normalise(global_feature))
        return operators(self.kernels).revise_logits(logits, local_features, self.memory, self.local_gradient)

    def write_memory(self, local_features: Tensor, labels: Tensor, epoch: int) -> None:
        """Writes one optimiser step's local features into the memory; call it after `optimizer.step()`.

        With several ranks, every rank writes the batch of all of them, so that their memories stay equal. With
        gradient accumulation, concatenate the micro-batches and write once. Without CGE there is nothing to write.

        Args:
            local_features: (B, n, C), as HeadOutput or `pool` give them; B may differ between ranks.
            labels: (B,), integer.
            epoch: t, counted from 1.

        Raises:
            ValueError: the epoch is outside 1..E, or shapes or labels do not fit.
        """
        if self.cge:
            alpha = memory_alpha(self.alpha, epoch, self.epochs)
            operators(self.kernels).write_memory_(self.memory, gather(local_features), gather(labels), alpha)

    def pool(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Global feature (B, C), before BNNeck, and local features (B, n, C) of a feature map, float32."""
        return operators(self.kernels).stripe_pool(feature_map, self.stripes, self.p)

    def _normalise(self, global_feature: Tensor) -> Tensor:
        with torch.autocast(global_feature.device.type, enabled=False):
            return self.neck(global_feature)

    def _logits(self, embedding: Tensor) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            return self.classifier(embedding * self.logit_scale)

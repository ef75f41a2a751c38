"""The CGE head: a feature map goes in; out come the loss in training and the embedding in use."""

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cge_fast.distributed import (
    Shard,
    gather,
    rank,
    require_equal,
    shard_of,
    sharded_cross_entropy,
    sum_over_ranks,
    world_size,
)
from cge_fast.losses.softmax import Classification, classification_losses, sphere_logits
from cge_fast.operators import (
    Kernels,
    local_hits,
    operators,
    require_shape,
    require_tensor,
    scratch_bytes,
    valid_labels,
)

GEM_INITIAL_P = 3.0
CLASSIFIER_STD = 0.001  # BagTricks' initialisation of the classifier
CONSTANT_ALPHA = 0.01
DRAWN_ROWS = 1024  # so that each draw is a multiple of 16 numbers, as torch draws them

Pooling = Literal["average", "gem"]
Alpha = Literal["linear", "exponential", "constant"]
Revision = Literal["logits", "features", "none"]


class HeadOutput(NamedTuple):
    """What a training forward returns; B batch, C channels, n stripes."""

    loss: Tensor  # 0-d: mean classification loss of the revised logits over the batch
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


def valid_targets(labels: Tensor, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    """Mask (B,) of the labels in [0, N), and int64 labels with 0 for the others.

    As in `revised_cross_entropy` a label outside is a ValueError on the CPU, and masked on a GPU.
    """
    require_tensor("labels", labels, "(B,)", "an integer")
    require_shape("labels", labels, (batch,), f"a batch of {batch}")
    valid = valid_labels(labels, classes)  # if nobody took the mask, torch.compile would drop the check
    return valid, torch.where(valid, labels, 0).long()


def rows_of_stripes(stripes: int, height: int) -> Tensor:
    """(n, H) float32: which stripes a row belongs to, as shares that add up to 1 for each row (stripes may overlap)."""
    row = torch.arange(height)
    first = torch.arange(stripes)[:, None] * height // stripes
    last = -(-(torch.arange(stripes)[:, None] + 1) * height // stripes)  # rounded up
    member = ((row >= first) & (row < last)).float()
    return member / member.sum(dim=0)


@torch.no_grad()
def draw_rows_(weight: Tensor, shard: Shard, std: float) -> None:
    """Fills a rank's rows (count, C) of the classifier with those that one process would draw for all N classes.

    The others are drawn and forgotten, so that every rank goes on with the same random numbers.
    """
    # The last piece has what remains: of fewer than 16 numbers torch draws each by itself.
    edges = [*range(0, max(1, shard.classes // DRAWN_ROWS) * DRAWN_ROWS, DRAWN_ROWS), shard.classes]
    buffer = weight.new_empty(edges[-1] - edges[-2], weight.shape[1])
    for start, end in itertools.pairwise(edges):
        buffer[: end - start].uniform_()  # what nn.Linear draws first
    for start, end in itertools.pairwise(edges):
        rows = buffer[: end - start].normal_(std=std)
        first, end = max(start, shard.first), min(end, shard.rows.stop)
        if first < end:
            weight[first - shard.first : end - shard.first] = rows[first - start : end - start]


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
        revision: what w multiplies. "logits", the paper's; "features": the classifier, a 1x1 convolution, makes N maps,
            the rows of stripe i are multiplied by sigmoid(s_i[k]) and the maps are averaged; "none": the memory is
            written and its precision known, but the logits stay as they are.
        shuffle_memory: a control: class k is revised by another class's rows, by a fixed permutation without a fixed
            point (`local_hit` takes the true ones).
        classification: loss of the logits: "cross_entropy", "focal" or "sphere".
        label_smoothing: e of the target (1-e) * onehot + e/N.
        classifier_std: standard deviation of the classifier's weights at the start.
        logit_scale: factor of the logits, 1 in the paper. Revision itself multiplies logits by 0.5 to 0.73, so a
            baseline with a smaller scale is the fair comparison.
        local_gradient: False detaches the revision's weights from the backbone.
        kernels: "fused", the operators of cge_kernels; "one_pass", the same with pooling and revision in one launch,
            which here reads the map a second time; "reference", those of cge_reference.
        shard_classes: each rank of a torch.distributed run has the classifier's and the memory's rows of some classes
            only (`cge_fast.distributed`), so that memory for each rank falls with their number; keep both outside of
            DistributedDataParallel. Then `loss` is that of all ranks' samples. One process has all rows as ever.

    Raises:
        ValueError: a number is out of range, a name unknown, a combination impossible, or (with shard_classes, on every
            rank) the ranks disagree on the sizes or there are fewer classes than ranks.
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
        revision: Revision = "logits",
        shuffle_memory: bool = False,
        classification: Classification = "cross_entropy",
        label_smoothing: float = 0.1,
        classifier_std: float = CLASSIFIER_STD,
        logit_scale: float = 1.0,
        local_gradient: bool = True,
        kernels: Kernels = "fused",
        shard_classes: bool = False,
    ):
        super().__init__()
        sizes = {"in_channels": in_channels, "num_classes": num_classes, "epochs": epochs, "stripes": stripes}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        choices = (
            ("pooling", pooling, Pooling),
            ("alpha", alpha, Alpha),
            ("revision", revision, Revision),
            ("classification", classification, Classification),
            ("kernels", kernels, Kernels),
        )
        for name, value, known in choices:
            if value not in known.__args__:
                raise ValueError(f"{name} must be one of {', '.join(known.__args__)}, got {value!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        if revision == "features" and (pooling, classification) != ("average", "cross_entropy"):
            raise ValueError(
                "revision 'features' averages the classifier's maps, so it goes with pooling 'average' and "
                f"classification 'cross_entropy', got {pooling!r} and {classification!r}"
            )
        if shuffle_memory and num_classes < 2:
            raise ValueError(f"shuffle_memory needs at least 2 classes, got {num_classes}")
        as_published = (cge, revision, classification, shuffle_memory) == (True, "logits", "cross_entropy", False)
        if shard_classes and not (as_published and kernels == "fused"):
            raise ValueError(
                "shard_classes needs cge, revision 'logits', classification 'cross_entropy', the memory not shuffled "
                f"and kernels 'fused', got {cge}, {revision!r}, {classification!r}, {shuffle_memory} and {kernels!r}"
            )
        self.epochs, self.alpha, self.cge, self.kernels = epochs, alpha, cge, kernels
        self.num_classes, self.shard = num_classes, None
        if shard_classes and world_size() > 1:
            require_equal(num_classes=num_classes, in_channels=in_channels, stripes=stripes)
            self.shard = shard_of(num_classes)
        self.stripes = stripes if cge else 1
        self.revision, self.shuffle_memory, self.classification = revision, shuffle_memory, classification
        self.label_smoothing, self.logit_scale, self.local_gradient = label_smoothing, logit_scale, local_gradient
        self.p = nn.Parameter(torch.tensor(GEM_INITIAL_P)) if pooling == "gem" else None
        self.neck = nn.BatchNorm1d(in_channels)
        self.neck.bias.requires_grad_(False)
        rows = self.shard.count if self.shard else num_classes
        if self.shard:
            self.classifier = nn.utils.skip_init(nn.Linear, in_channels, rows, bias=False)
            draw_rows_(self.classifier.weight, self.shard, classifier_std)
        else:
            self.classifier = nn.Linear(in_channels, rows, bias=False)
            nn.init.normal_(self.classifier.weight, std=classifier_std)
        self.register_buffer("memory", torch.zeros(stripes, rows, in_channels) if cge else None)
        # A rotation of a random order has no fixed point; the same for every seed, so that a resumed run has it too.
        order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(0))
        shuffled = order.roll(1)[order.argsort()] if shuffle_memory else None
        self.register_buffer("shuffled", shuffled, persistent=False)

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
        if self.shard:
            return self._forward_sharded(feature_map, labels)
        as_published = (self.revision, self.classification, self.shuffled) == ("logits", "cross_entropy", None)
        if self.cge and as_published and self.kernels != "one_pass":
            return self._forward_fused(feature_map, labels)
        valid, targets = valid_targets(labels, len(feature_map), self.num_classes)
        global_feature, local_features = self.pool(feature_map)
        logits, embedding = self._revised(feature_map, global_feature, local_features, targets)
        losses = classification_losses(logits, targets, self.classification, self.label_smoothing)
        loss, hit = torch.where(valid, losses, torch.nan).mean(), logits.argmax(dim=1) == labels
        if not self.cge:
            return HeadOutput(loss, global_feature, embedding, None, hit, None)
        local_features = local_features.detach()
        local_hit = local_hits(local_features, self.memory, labels)
        return HeadOutput(loss, global_feature, embedding, local_features, hit, local_hit)

    def _forward_fused(self, feature_map: Tensor, labels: Tensor) -> HeadOutput:
        """Training with the paper's CGE, where the loss takes the features: `revised_cross_entropy`."""
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

    def _forward_sharded(self, feature_map: Tensor, labels: Tensor) -> HeadOutput:
        """The same where each rank has some of the classes; the loss is that of all ranks' samples."""
        require_tensor("labels", labels, "(B,)", "an integer")
        require_shape("labels", labels, (len(feature_map),), f"a batch of {len(feature_map)}")
        global_feature, local_features = self.pool(feature_map)
        embedding = self._normalise(global_feature)
        loss, hit, local_hit = sharded_cross_entropy(
            embedding * self.logit_scale,
            self.classifier.weight,
            local_features,
            self.memory,
            labels,
            self.shard,
            self.label_smoothing,
            self.local_gradient,
        )
        own = slice(rank() * len(labels), (rank() + 1) * len(labels))
        local_features = local_features.detach()
        return HeadOutput(loss.mean(), global_feature, embedding, local_features, hit[own], local_hit[own])

    def _revised(
        self, feature_map: Tensor, global_feature: Tensor, local_features: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Revised logits (B, N) and embedding (B, C); `labels` (B,) int64 say where "sphere" has its margin."""
        if self.cge and self.revision == "features":
            return self._revised_maps(feature_map, local_features)
        embedding = self._normalise(global_feature)
        logits = self._logits(embedding, labels)
        if not self.cge or self.revision == "none":
            return logits, embedding
        memory = self._revising_memory()
        if self.kernels == "one_pass":
            revise = operators(self.kernels).revise_logits_one_pass
            return revise(feature_map, logits, memory, self.p, local_gradient=self.local_gradient)[0], embedding
        revise = operators(self.kernels).revise_logits
        return revise(logits, local_features, memory, self.local_gradient), embedding

    def _revised_maps(self, feature_map: Tensor, local_features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N) from N maps whose rows are multiplied by their stripe's sigmoid(s_i), then averaged; embedding.

        BNNeck normalises the map's positions here; the average commutes with it, so the embedding in use is the same.
        """
        batch, channels, height, width = feature_map.shape
        positions = feature_map.permute(0, 2, 3, 1).reshape(-1, channels).float()
        rows = self._normalise(positions).view(batch, height, width, channels).mean(dim=2)
        maps = self._logits(rows)  # (B, H, N): the convolution commutes with the average over a row
        memory = self._revising_memory()
        ones = local_features.new_ones(batch, memory.shape[1])
        revise = operators(self.kernels).revise_logits  # of one stripe's memory it gives sigmoid(s_i)
        weights = torch.stack(
            [
                revise(ones, local_features[:, i : i + 1], memory[i : i + 1], self.local_gradient)
                for i in range(self.stripes)
            ]
        )
        share = rows_of_stripes(self.stripes, height).to(weights)
        return torch.einsum("ibk,ih,bhk->bk", weights, share, maps) / height, rows.mean(dim=1)

    def _revising_memory(self) -> Tensor:
        return self.memory if self.shuffled is None else self.memory[:, self.shuffled]

    def revision_weights(self, local_features: Tensor, rows: slice = slice(None)) -> Tensor:
        """w (B, N) float32 of local features (B, n, C): what the logits are multiplied by; no gradient.

        rows: of which classes; with shard_classes they are those of this rank.
        """
        with torch.no_grad():
            memory = self._revising_memory()[:, rows].contiguous()
            ones = local_features.new_ones(len(local_features), memory.shape[1])
            return operators(self.kernels).revise_logits(ones, local_features, memory)

    @torch.no_grad()
    def label_and_mean_weight(self, local_features: Tensor, labels: Tensor) -> Tensor:
        """(2,) float32: w of the label and the mean of w over all classes, each summed over the samples.

        With shard_classes the sum is that of all ranks' samples, divided by the ranks.

        Args:
            local_features: (B, n, C).
            labels: (B,), integer.
        """
        if self.shard:
            local_features, labels = gather(local_features), gather(labels)
        row = labels.long() - (self.shard.first if self.shard else 0)
        found = local_features.new_zeros(2)
        stripes, classes, channels = self.memory.shape
        numbers_per_class = stripes * channels + (stripes + 2) * len(labels)  # a copy of the memory, scores, weights
        chunk = max(1, scratch_bytes() // (4 * numbers_per_class))
        for start in range(0, classes, chunk):
            weights = self.revision_weights(local_features, slice(start, start + chunk))
            place = row - start
            is_here = (place >= 0) & (place < weights.shape[1])
            own = weights.gather(1, torch.where(is_here, place, 0)[:, None])[:, 0]
            found += torch.stack([torch.where(is_here, own, 0).sum(), weights.sum() / self.num_classes])
        if self.shard:
            sum_over_ranks(found)
            found /= world_size()
        return found

    def embed(self, feature_map: Tensor, after_neck: bool = True) -> Tensor:
        """The global feature (B, C) float32 of a feature map (B, C, H, W), after BNNeck or before it."""
        global_feature, _ = operators(self.kernels).stripe_pool(feature_map, 1, self.p)
        return self._normalise(global_feature) if after_neck else global_feature

    def revise(self, feature_map: Tensor, labels: Tensor | None = None) -> Tensor:
        """Revised logits (B, N) float32 of a feature map (B, C, H, W), for losses of your own.

        With shard_classes those of this rank's classes alone, without what a loss over all classes would need.

        labels: (B,) int64 in [0, N), for classification "sphere": where its margin is set; without them there is none.

        What write_memory then takes: `_, local_features = head.pool(feature_map.detach())`.
        """
        global_feature, local_features = self.pool(feature_map)
        return self._revised(feature_map, global_feature, local_features, labels)[0]

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
        if not self.cge:
            return
        alpha = memory_alpha(self.alpha, epoch, self.epochs)
        local_features, labels = gather(local_features), gather(labels)
        if self.shard:
            valid_labels(labels, self.num_classes)
            labels = labels - self.shard.first
            is_own = (labels >= 0) & (labels < self.shard.count)
            if labels.device.type == "cpu":
                local_features, labels = local_features[is_own], labels[is_own]
            else:  # choosing would synchronise with the host; the kernel writes nothing for a label of -1
                labels = torch.where(is_own, labels, -1)
        operators(self.kernels).write_memory_(self.memory, local_features, labels, alpha)

    def pool(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Global feature (B, C), before BNNeck, and local features (B, n, C) of a feature map, float32."""
        return operators(self.kernels).stripe_pool(feature_map, self.stripes, self.p)

    def _normalise(self, global_feature: Tensor) -> Tensor:
        with torch.autocast(global_feature.device.type, enabled=False):
            return self.neck(global_feature)

    def _logits(self, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            if self.classification == "sphere" and labels is not None:
                return sphere_logits(embedding, self.classifier.weight, labels) * self.logit_scale
            return self.classifier(embedding * self.logit_scale)

"""Comprehensive Global Embedding as a loss: the classifier, the memory of local features and the revised logits."""

import torch
from torch import Tensor, nn

from cge_fast.distributed import gather, rank, require_equal, sum_over_ranks, world_size
from cge_fast.losses.softmax import CLASSIFIER_STD, LossOutput, draw_classifier, linear_float32, require_sizes
from cge_fast.model import Embeddings
from cge_kernels import ClassShard, revise_logits, revised_cross_entropy, scratch_bytes, write_memory_


class CGELoss(nn.Module):
    """Cross entropy of the logits revised by the memory (Xi et al. 2023, equations 1 to 5).

    In a step: `out = loss(embeddings, labels)`, `out.loss.backward()`, `optimizer.step()`, and then
    `loss.write_memory(embeddings.stripes, labels, momentum)`.

    Args:
        in_channels: C of the embeddings.
        num_classes: N, identities in training.
        stripes: n, stripes of the embeddings.
        label_smoothing: e of the target (1-e) * onehot + e/N.
        classifier_std: standard deviation of the classifier's weight at the start.
        shard: the classes whose rows of weight and memory this rank has, so that memory for each rank falls with their
            number; keep the module outside of DistributedDataParallel. Then `loss` is that of all ranks' samples, of
            which each rank must have as many. None: all rows are here.

    Raises:
        ValueError: a number is out of range, or (with a shard, on every rank) the ranks disagree on the sizes.
    """

    memory: Tensor  # (n, N, C)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stripes: int = 3,
        label_smoothing: float = 0.1,
        classifier_std: float = CLASSIFIER_STD,
        shard: ClassShard | None = None,
    ):
        super().__init__()
        require_sizes(label_smoothing, in_channels=in_channels, num_classes=num_classes, stripes=stripes)
        if shard:
            require_equal(num_classes=num_classes, in_channels=in_channels, stripes=stripes)
        self.num_classes, self.label_smoothing, self.shard = num_classes, label_smoothing, shard
        self.weight = nn.Parameter(draw_classifier(num_classes, in_channels, classifier_std, shard))
        self.register_buffer("memory", torch.zeros(stripes, len(self.weight), in_channels))

    def forward(self, embeddings: Embeddings, labels: Tensor) -> LossOutput:
        """The loss of labels (B,), integer, in [0, N).

        Raises:
            ValueError, TypeError: shapes, dtypes or labels do not fit; the message names the argument.
        """
        losses, correct, stripe_correct = revised_cross_entropy(
            embeddings.embedding,
            self.weight,
            embeddings.stripes,
            self.memory,
            labels,
            self.label_smoothing,
            shard=self.shard,
        )
        if self.shard:  # all ranks' samples come back
            own = slice(rank() * len(labels), (rank() + 1) * len(labels))
            correct, stripe_correct = correct[own], stripe_correct[own]
        return LossOutput(losses.mean(), correct, stripe_correct)

    def revised_logits(self, embeddings: Embeddings) -> Tensor:
        """(B, N) float32, for analyses and losses of your own; with a shard those of its classes alone."""
        logits = linear_float32(embeddings.embedding, self.weight)
        return revise_logits(logits, embeddings.stripes, self.memory)

    def write_memory(self, stripes: Tensor, labels: Tensor, momentum: float) -> None:
        """Writes one step's stripe features into the memory; call it after `optimizer.step()`.

        With several ranks, every rank writes the batch of all of them, so that their memories stay equal. With
        gradient accumulation, concatenate the micro-batches and write once.

        Args:
            stripes: (B, n, C), as Embeddings have them; B may differ between ranks.
            labels: (B,), integer.
            momentum: how much of an old row stays (the paper's alpha).
        """
        stripes = stripes.detach()
        if not self.shard:  # with one, the operator gathers
            stripes, labels = gather(stripes), gather(labels)
        write_memory_(self.memory, stripes, labels, momentum, shard=self.shard)

    def label_and_mean_weight(self, stripes: Tensor, labels: Tensor) -> Tensor:
        """See `label_and_mean_weight`; no gradient."""
        return label_and_mean_weight(stripes, self.memory, labels, self.shard)


def revision_weights(stripes: Tensor, memory: Tensor) -> Tensor:
    """w (B, N) float32 that the logits are multiplied by, of stripe features (B, n, C) and memory (n, N, C)."""
    with torch.no_grad():
        ones = stripes.new_ones(len(stripes), memory.shape[1])
        return revise_logits(ones, stripes, memory.contiguous())


@torch.no_grad()
def label_and_mean_weight(stripes: Tensor, memory: Tensor, labels: Tensor, shard: ClassShard | None = None) -> Tensor:
    """(2,) float32: w of the label and the mean of w over all classes, each summed over the samples.

    With a shard the sum is that of all ranks' samples, divided by the ranks.

    Args:
        stripes: (B, n, C).
        memory: (n, N, C), or with a shard its rows.
        labels: (B,), integer.
        shard: the classes of this rank's rows.
    """
    if shard:
        stripes, labels = gather(stripes), gather(labels)
    row = labels.long() - (shard.first if shard else 0)
    sums = stripes.new_zeros(2)
    n, classes, channels = memory.shape
    numbers_per_class = n * channels + (n + 2) * len(labels)  # a copy of the memory, scores, weights
    chunk = max(1, scratch_bytes() // (4 * numbers_per_class))
    for start in range(0, classes, chunk):
        weights = revision_weights(stripes, memory[:, start : start + chunk])
        place = row - start
        is_here = (place >= 0) & (place < weights.shape[1])
        own = weights.gather(1, torch.where(is_here, place, 0)[:, None])[:, 0]
        sums += torch.stack([torch.where(is_here, own, 0).sum(), weights.sum() / (shard.classes if shard else classes)])
    if shard:
        sum_over_ranks(sums)
        sums /= world_size()
    return sums

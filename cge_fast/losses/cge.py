"""Comprehensive Global Embedding as a loss: the classifier, the memory of local features and the revised logits."""

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from cge_fast.distributed import gather, inside_ddp, rank, require_equal, sum_over_ranks, world_size
from cge_fast.losses.softmax import CLASSIFIER_STD, LossOutput, draw_classifier, linear_float32, require_sizes
from cge_fast.model import AtLeastFloat32, Embeddings
from cge_kernels import ClassShard, revise_logits, revised_cross_entropy, scratch_bytes, write_memory_

FORGOTTEN_AFTER = 100  # training steps without a write, after which a warning says so


class CGELoss(AtLeastFloat32):
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
        memory_dtype: torch.bfloat16 or torch.float16: the loss reads a copy of the memory in it, which every write
            refreshes, so that its matmuls take such operands (a GPU's tensor cores) and add in float32; float16 wants
            the usual loss scaling. None: it reads the float32 memory.

    Raises:
        ValueError: a number or dtype is out of range, or (with a shard, on every rank) the ranks disagree on the sizes.
    """

    memory: Tensor  # (n, N, C), float32: what is written and saved
    low_precision_memory: Tensor | None  # its copy in memory_dtype

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stripes: int = 3,
        label_smoothing: float = 0.1,
        classifier_std: float = CLASSIFIER_STD,
        shard: ClassShard | None = None,
        memory_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        require_sizes(label_smoothing, in_channels=in_channels, num_classes=num_classes, stripes=stripes)
        if memory_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"memory_dtype must be torch.bfloat16, torch.float16 or None, got {memory_dtype}")
        if shard:
            require_equal(num_classes=num_classes, in_channels=in_channels, stripes=stripes)
        self.num_classes, self.label_smoothing, self.shard = num_classes, label_smoothing, shard
        self.weight = nn.Parameter(draw_classifier(num_classes, in_channels, classifier_std, shard))
        self.register_buffer("memory", torch.zeros(stripes, len(self.weight), in_channels))
        self.register_buffer("low_precision_memory", None, persistent=False)
        self.memory_dtype, self.steps_since_write = memory_dtype, 0
        self._refresh()

    def _refresh(self) -> None:
        """Copies the memory, after somebody else than `write_memory` has changed it."""
        if self.memory_dtype:
            self.low_precision_memory = self.memory.to(self.memory_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._refresh()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._refresh()

    @property
    def memory_read(self) -> Tensor:
        """The memory (n, N, C) as the loss reads it: the low-precision copy if there is one."""
        return self.memory if self.low_precision_memory is None else self.low_precision_memory

    def forward(self, embeddings: Embeddings, labels: Tensor) -> LossOutput:
        """The loss of labels (B,), integer, in [0, N).

        Raises:
            ValueError, TypeError: shapes, dtypes or labels do not fit; the message names the argument.
            RuntimeError: it has a shard, and DistributedDataParallel around it.
        """
        if self.shard and inside_ddp(self.weight):
            raise RuntimeError(
                "CGELoss: with a shard each rank has other classes, whose gradients DistributedDataParallel would "
                "average; wrap the network alone, and call the loss outside of it"
            )
        if self.training and not torch.compiler.is_compiling():
            self._count_step()
        losses, correct, stripe_correct = revised_cross_entropy(
            embeddings.embedding,
            self.weight,
            embeddings.stripes,
            self.memory_read,
            labels,
            self.label_smoothing,
            shard=self.shard,
        )
        if self.shard:  # all ranks' samples came back
            own = slice(rank() * len(labels), (rank() + 1) * len(labels))
            correct, stripe_correct = correct[own], stripe_correct[own]
        return LossOutput(losses.mean(), correct, stripe_correct)

    def _count_step(self) -> None:
        self.__dict__["steps_since_write"] += 1  # a module's own assignment takes the host as long as a launch
        if self.steps_since_write == FORGOTTEN_AFTER:
            warnings.warn(
                f"CGELoss: {FORGOTTEN_AFTER} training steps without write_memory, which belongs after each "
                "optimizer.step(); the memory stays as it is",
                stacklevel=2,
            )

    def revised_logits(self, embeddings: Embeddings) -> Tensor:
        """(B, N) float32, for analyses and losses of your own; with a shard those of its classes alone."""
        logits = linear_float32(embeddings.embedding, self.weight)
        return revise_logits(logits, embeddings.stripes, self.memory_read)

    def write_memory(self, stripes: Tensor, labels: Tensor, momentum: float) -> None:
        """Writes one step's stripe features into the memory; call it after `optimizer.step()`.

        With several ranks, every rank writes the batch of all of them, so that their memories stay equal. All must call
        it: one that calls it alone waits for the others until the process group's timeout. With gradient accumulation,
        concatenate the micro-batches and write once.

        Args:
            stripes: (B, n, C), as Embeddings have them, B the same on every rank.
            labels: (B,), integer.
            momentum: how much of an old row stays (the paper's alpha).

        Raises:
            ValueError, TypeError: shapes, dtypes, labels or momentum do not fit, or (on the CPU) the ranks have
                different numbers of samples, over which GPUs would wait for each other.
        """
        self.__dict__["steps_since_write"] = 0
        stripes = stripes.detach()
        if not self.shard:  # with one, the operator gathers
            stripes, labels = gather(stripes), gather(labels)
        write_memory_(self.memory, stripes, labels, momentum, self.low_precision_memory, shard=self.shard)

    def label_and_mean_weight(self, stripes: Tensor, labels: Tensor) -> Tensor:
        """See `label_and_mean_weight`; no gradient."""
        return label_and_mean_weight(stripes, self.memory_read, labels, self.shard)


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
        stripes: (B, n, C), with a shard B the same on every rank.
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

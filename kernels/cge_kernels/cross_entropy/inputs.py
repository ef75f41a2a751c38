"""What the functions of revised_cross_entropy hand to each other."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors that the loss is made from, with the rows of all N classes or of a run of them."""

    features: Tensor  # (B, C)
    weight: Tensor  # (rows, C)
    local_features: Tensor  # (B, n, C')
    memory: Tensor  # (n, rows, C')
    labels: Tensor  # (B,), of all classes
    bias: Tensor | None  # (rows,)
    first_class: int  # the class of the first row
    all_classes: int  # N

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, n and the number of rows."""
        return len(self.features), *self.memory.shape[:2]

    def rows(self, part: slice) -> Self:
        """The same of some of the rows."""
        bias = None if self.bias is None else self.bias[part]
        weight, memory = self.weight[part], self.memory[:, part]
        return self._replace(weight=weight, memory=memory, bias=bias, first_class=self.first_class + part.start)

    def contiguous(self) -> Self:
        """The same with those tensors contiguous of which the kernels expect it."""
        if self.weight.is_contiguous() and self.labels.is_contiguous() and self.bias is None:
            return self
        bias = None if self.bias is None else self.bias.contiguous()
        return self._replace(weight=self.weight.contiguous(), labels=self.labels.contiguous(), bias=bias)


class Statistics(NamedTuple):
    """Of the revised logits of each sample and, for the arg max, of each stripe's scores; over some classes or all."""

    row_max: Tensor  # (n+1, B): of the revised logits, then of each stripe's scores
    argmax: Tensor  # (n+1, B) int64: the lowest class that has it
    sums: Tensor  # (2, B): sum of exp(revised - row_max), sum of the revised logits
    label_logit: Tensor  # (B,): the label's revised logit, 0 where the label is none of these classes

    def sums_below(self, row_max: Tensor) -> Tensor:
        """The sums, those of exponentials as of another row_max, which is no lower."""
        return torch.stack([self.sums[0] * (self.row_max[0] - row_max[0]).exp(), self.sums[1]])


class Loss(NamedTuple):
    """The results, and lse, the logarithm of the sum of the revised logits' exponentials."""

    loss: Tensor  # (B,)
    lse: Tensor  # (B,)
    correct: Tensor  # (B,) bool
    stripe_correct: Tensor  # (B, n) bool


class Saved(NamedTuple):
    """What the backward takes beside the inputs."""

    lse: Tensor  # (B,)
    saved_logits: Tensor  # (n+1, at least rows, at least B): logits, then each stripe's scores; no rows if no room
    inv_norm: Tensor  # (n, B): 1 / max(||f_i||, 1e-12)


def empty_statistics(features: Tensor, stripes: int, dtype: torch.dtype) -> Statistics:
    """Where statistics of the features' samples go."""
    row_max = features.new_empty(stripes + 1, len(features), dtype=dtype)
    argmax = torch.empty_like(row_max, dtype=torch.int64)
    return Statistics(row_max, argmax, torch.empty_like(row_max[:2]), torch.empty_like(row_max[0]))


def empty_loss(features: Tensor, stripes: int, dtype: torch.dtype) -> Loss:
    """Where the results of the features' samples go."""
    loss, correct = features.new_empty(len(features), dtype=dtype), features.new_empty(len(features), dtype=torch.bool)
    return Loss(loss, torch.empty_like(loss), correct, correct.new_empty(len(features), stripes))


def as_dict(results: Statistics | Loss | None, kind: type[Statistics] | type[Loss]) -> dict[str, Tensor | None]:
    """The results by name; without them None for each."""
    return dict.fromkeys(kind._fields) if results is None else results._asdict()

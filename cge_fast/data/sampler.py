"""Batches of P identities x K instances."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from cge_fast.errors import UserError

Batch = list[tuple[int, int]]  # index of an image, seed of its augmentation
Law = Literal["balanced", "naive", "random"]


class PKSampler(Sampler[Batch]):
    """Yields batches of (index of an image, seed of its augmentation), P identities x K instances in each.

    Everything follows from (seed, epoch) alone, so that a resumed run, or one with other workers, sees the same
    batches. With several ranks each takes its own P / ranks identities of every batch. No identity is twice in a batch;
    of one with fewer than K images, some are drawn again. How identities are drawn:

    - balanced: in rounds, each once before any twice, and K images of an identity anew every time. An epoch is
      floor(images / (P*K)) batches, and the same of naive.
    - naive, as FastReID's NaiveIdentitySampler: of those that have K images left which were not drawn yet, until there
      are fewer than P; then from all images again. Such passes follow each other, and epochs are cut out of them.
    - random, as reid-strong-baseline's RandomIdentitySampler: an epoch is one such pass, whose length is not fixed.

    Args:
        labels: the label of each image.
        identities: P, over all ranks.
        instances: K.
        seed: any non-negative number.
        rank, ranks: this process and how many there are; P must be divisible by `ranks`.
        law: how identities are drawn.

    Raises:
        UserError: fewer identities than P, fewer images than P*K, or P is not divisible by the ranks.
    """

    def __init__(
        self,
        labels: Sequence[int],
        identities: int,
        instances: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        law: Law = "balanced",
    ):
        images_of = defaultdict(list)
        for index, label in enumerate(labels):
            images_of[label].append(index)
        self.images_of = {label: np.array(images_of[label]) for label in sorted(images_of)}
        if len(images_of) < identities:
            raise UserError(f"data.identities: a batch needs {identities}, the training split has {len(images_of)}")
        if len(labels) < identities * instances:
            raise UserError(
                f"data.instances: a batch needs {identities} x {instances} images, the training split has {len(labels)}"
            )
        if identities % ranks:
            raise UserError(f"data.identities: {identities} cannot be shared evenly by {ranks} processes")
        self.identities, self.instances, self.seed, self.law = identities, instances, seed, law
        self.rank, self.ranks = rank, ranks
        self.batches = len(labels) // (identities * instances)
        self.epoch = 1  # the training loop sets it
        self.passes: Iterator[Batch] = iter(())
        self.passes_epoch = 0  # whose batches `passes` gives next

    def __len__(self) -> int:
        """Batches of the epoch."""
        if self.law == "random":
            return sum(1 for _ in self.one_pass(self.epoch))
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        size = self.identities // self.ranks * self.instances
        laws = {"balanced": self.balanced, "naive": self.naive, "random": lambda: self.one_pass(self.epoch)}
        for batch in laws[self.law]():
            yield batch[self.rank * size : (self.rank + 1) * size]

    def balanced(self) -> Iterator[Batch]:
        """The epoch's batches, whole."""
        random = np.random.default_rng([self.seed, self.epoch])
        round_: list[int] = []
        for _ in range(self.batches):
            drawn: list[int] = []
            while len(drawn) < self.identities:
                free = next((label for label in round_ if label not in drawn), None)
                if free is None:
                    round_ += random.permutation(list(self.images_of)).tolist()
                else:
                    round_.remove(free)
                    drawn.append(free)
            batch: Batch = []
            for label in drawn:
                images = self.images_of[label]
                chosen = random.choice(images, self.instances, replace=len(images) < self.instances)
                batch += zip(chosen.tolist(), random.integers(2**63, size=self.instances).tolist(), strict=True)
            yield batch

    def naive(self) -> Iterator[Batch]:
        """The epoch's batches, whole; after the epoch before, the passes need not be drawn again from the first."""
        if self.passes_epoch != self.epoch:
            passes = chain.from_iterable(map(self.one_pass, count(1)))
            self.passes = islice(passes, (self.epoch - 1) * self.batches, None)
        self.passes_epoch = self.epoch + 1
        return iter(list(islice(self.passes, self.batches)))

    def one_pass(self, number: int) -> Iterator[Batch]:
        """Whole batches of images that are drawn once each, until fewer than P identities have K of them left."""
        random = np.random.default_rng([self.seed, number])
        left = {}
        for label, images in self.images_of.items():
            enough = images if len(images) >= self.instances else random.choice(images, self.instances)
            left[label] = random.permutation(enough)
        while len(left) >= self.identities:
            batch: Batch = []
            for label in random.choice(list(left), self.identities, replace=False).tolist():
                chosen, rest = np.split(left[label], [self.instances])
                batch += zip(chosen.tolist(), random.integers(2**63, size=self.instances).tolist(), strict=True)
                if len(rest) >= self.instances:
                    left[label] = rest
                else:
                    del left[label]
            yield batch

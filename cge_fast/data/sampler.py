"""Batches of P identities x K instances."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from cge_fast.errors import UserError


class PKSampler(Sampler[list[tuple[int, int]]]):
    """Yields batches of (index of an image, seed of its augmentation), P identities x K instances in each.

    An epoch is floor(images / (P*K)) batches. Identities are drawn in rounds: each once before any twice, and no
    identity twice in a batch. Of an identity with fewer than K images, some are drawn again. Everything follows from
    (seed, epoch) alone, so that a resumed run, or one with other workers, sees the same batches. With several ranks
    each takes its own P / ranks identities of every batch.

    Args:
        labels: the label of each image.
        identities: P, over all ranks.
        instances: K.
        seed: any non-negative number.
        rank, ranks: this process and how many there are; P must be divisible by `ranks`.

    Raises:
        UserError: fewer identities than P, fewer images than P*K, or P is not divisible by the ranks.
    """

    def __init__(
        self, labels: Sequence[int], identities: int, instances: int, seed: int = 0, rank: int = 0, ranks: int = 1
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
        self.identities, self.instances, self.seed = identities, instances, seed
        self.rank, self.ranks = rank, ranks
        self.batches = len(labels) // (identities * instances)
        self.epoch = 1  # the training loop sets it

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        random = np.random.default_rng([self.seed, self.epoch])
        share = self.identities // self.ranks
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
            batch: list[tuple[int, int]] = []
            for label in drawn:
                images = self.images_of[label]
                chosen = random.choice(images, self.instances, replace=len(images) < self.instances)
                batch += zip(chosen.tolist(), random.integers(2**63, size=self.instances).tolist(), strict=True)
            size = share * self.instances
            yield batch[self.rank * size : (self.rank + 1) * size]

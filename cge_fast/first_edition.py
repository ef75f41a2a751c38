"""Checkpoints of the first edition, as this one names and parts their tensors.

There model.safetensors had the classifier and the memory too, as parts of a head, unless each rank wrote its rows to a
file classes-<first>-<end>-of-<N>.safetensors, with Adam's moments; training.pt had the centers.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cge_fast.errors import UserError
from cge_kernels import ClassShard

CLASSIFIER, MEMORY = "head.classifier.weight", "head.memory"
LOSS = {"classification.weight": (CLASSIFIER, 0), "classification.memory": (MEMORY, 1)}  # and the axis of classes
ROWS_FILE = re.compile(r"classes-(\d+)-(\d+)-of-(\d+)\.safetensors")


def of_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by their present names."""
    return {
        name.replace("head.p", "pool.p").replace("head.neck.", "neck."): tensor
        for name, tensor in weights.items()
        if name not in (CLASSIFIER, MEMORY)
    }


def rows_files(checkpoint: Path, whole: Path) -> list[tuple[int, int, Path]]:
    """First class, end and file of the ranks' rows, in order; of a checkpoint that is whole its one file.

    Raises:
        UserError: a file is missing.
    """
    matches = [(match, path) for path in checkpoint.iterdir() if (match := ROWS_FILE.fullmatch(path.name))]
    if not matches:
        with safe_open(whole, "pt") as file:
            if CLASSIFIER not in file.keys():  # noqa: SIM118, a file is no dict
                raise UserError(f"checkpoint {whole} has no {CLASSIFIER}: it is of another kind of network")
            return [(0, file.get_slice(CLASSIFIER).get_shape()[0], whole)]
    files = sorted((int(match[1]), int(match[2]), path) for match, path in matches)
    ends = [0, *(end for _, end, _ in files)]
    firsts = [*(first for first, _, _ in files), *{int(match[3]) for match, _ in matches}]
    for end, first in zip(ends, firsts, strict=False):  # each file begins where the one before ends
        if end != first:
            raise UserError(f"checkpoint {checkpoint} has no file with the rows of classes {end} to {first - 1}")
    return files


def read_loss(checkpoint: Path, whole: Path, shard: ClassShard | None) -> dict[str, Tensor]:
    """The criterion's tensors by their present names, all rows or a shard's, but for the centers."""
    files = rows_files(checkpoint, whole)
    tensors = {name: read_rows(files, old, axis, shard) for name, (old, axis) in LOSS.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def read_moments(checkpoint: Path, shard: ClassShard | None) -> dict[str, Tensor]:
    """Adam's moments of the classifier from the ranks' rows, all or a shard's."""
    files = rows_files(checkpoint, checkpoint)
    return {name: read_rows(files, name, 0, shard) for name in ("exp_avg", "exp_avg_sq")}


def read_rows(files: list[tuple[int, int, Path]], name: str, axis: int, shard: ClassShard | None) -> Tensor | None:
    """A tensor's rows, all or a shard's, from `rows_files`; None if there is no such tensor."""
    rows = shard.rows if shard else slice(0, files[-1][1])
    parts = []
    for first, end, path in files:
        start, stop = max(first, rows.start) - first, min(end, rows.stop) - first
        if start < stop:
            try:
                with safe_open(path, "pt") as file:
                    if name not in file.keys():  # noqa: SIM118
                        return None
                    part = file.get_slice(name)
                    parts.append(part[start:stop] if axis == 0 else part[:, start:stop])
            except SafetensorError as error:
                raise UserError(f"checkpoint {path} cannot be read ({error})") from error
    return torch.cat(parts, dim=axis)

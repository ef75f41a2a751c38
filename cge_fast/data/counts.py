"""How many identities, images and cameras the splits of a data set have, beside what was published of it."""

from collections.abc import Mapping
from typing import NamedTuple

from cge_fast.data.images import ReidSet
from cge_fast.errors import UserError


class Counts(NamedTuple):
    """Of one split; None is not published. Distractors count as one identity, as they do in the published tables."""

    identities: int | None
    images: int | None
    cameras: int | None


SetCounts = Mapping[str, Counts]  # of train, query and gallery


def count(reid_set: ReidSet) -> SetCounts:
    """The counts of each split."""
    return {
        split: Counts(len({image.identity for image in images}), len(images), len({image.camera for image in images}))
        for split, images in vars(reid_set).items()
    }


def table(found: SetCounts, published: SetCounts | None) -> str:
    """A line for each split: what was found and, if something was published, that beside it."""
    sides = (found,) if published is None else (found, published)
    names = "".join(f"{column:>12}" for column in Counts._fields)
    heads = (f"{'found':8}" + names, f"    {'published':9}" + names)
    lines = ["".join(heads[: len(sides)])]
    for split in found:
        cells = ["".join(f"{'-' if value is None else f'{value:,}':>12}" for value in side[split]) for side in sides]
        lines.append(f"{split:8}" + f"{'':13}".join(cells))
    return "\n".join(lines)


def require_published(found: SetCounts, published: SetCounts) -> None:
    """Raises UserError, which names every count that differs, if the set is not the published one."""
    differing = [
        f"{split} {column} {ours:,}, not {theirs:,}"
        for split in published
        for column, ours, theirs in zip(Counts._fields, found[split], published[split], strict=True)
        if theirs is not None and ours != theirs
    ]
    if differing:
        raise UserError("data.root: these are not the published counts: " + "; ".join(differing))

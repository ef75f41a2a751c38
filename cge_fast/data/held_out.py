"""Query and gallery out of the training images of a set that has nothing else."""

from collections import defaultdict
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from cge_fast.data.images import SPLITS, Image, Reader, ReidSet, Split
from cge_fast.data.market1501 import DISTRACTOR
from cge_fast.data.walk import AbsentError
from cge_fast.errors import notice


def with_held_out(
    read_set: Reader, share: float, root: Path, needed: Collection[Split] = SPLITS, optional: Collection[Split] = ()
) -> ReidSet:
    """The set as its Reader gives it; one of training images alone with a share of the identities as query and gallery.

    Only identities of two cameras or more are held out: those whose names have the least SHA-256, at least one, so that
    a set which grows keeps most of them. All their images are the gallery, and the first of each camera is a query,
    which the protocol does not match with its own camera.
    """
    found = read_set(root, (), SPLITS)
    if found.query or found.gallery or not found.train:
        return read_set(root, needed, optional)
    cameras_of = defaultdict(set)
    for image in found.train:
        if image.identity != DISTRACTOR:
            cameras_of[image.labels[0]].add(image.camera)
    several = sorted((name for name in cameras_of if len(cameras_of[name]) > 1), key=digest)
    held_out = {*several[: max(1, round(share * len(several)))]}
    gallery = [image for image in found.train if image.labels[0] in held_out]
    train = [image for image in found.train if image.labels[0] not in held_out]
    query = list({(image.identity, image.camera): image for image in reversed(gallery)}.values())[::-1]
    notice(
        f"data.held_out: {root} has images to train on alone; {len(held_out)} of its {len(cameras_of)} identities "
        f"({len(gallery)} of {len(found.train)} images) are held out as query and gallery"
    )
    parts: dict[Split, list[Image]] = {"train": train, "query": query, "gallery": gallery}
    for split in needed:
        if not parts[split]:
            raise AbsentError(
                f"data.held_out: {share} of {len(several)} identities of several cameras leaves no {split}"
            )
    return ReidSet(**{split: part if split in (*needed, *optional) else [] for split, part in parts.items()})


def digest(name: int | str) -> str:
    """The SHA-256 of an identity's name."""
    return sha256(str(name).encode()).hexdigest()

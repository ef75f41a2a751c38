"""A user's own crops: root/split/identity/camera_anything.jpg."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from cge_fast.data.images import SPLITS, Image, ReidSet, Split, by_split
from cge_fast.data.market1501 import DISTRACTOR, JUNK, NAME
from cge_fast.data.walk import image_files
from cge_fast.errors import UserError


class Crop(NamedTuple):
    """One image file and what its path says."""

    path: Path
    identity: str | None  # None is a distractor
    camera: str


def read_folder(root: Path, needed: Collection[Split] = SPLITS, optional: Collection[Split] = ()) -> ReidSet:
    """Reads root/train, root/query and root/gallery; in each a folder for each identity, named as you like.

    The camera is what stands before the first underscore of a file's name, any text; of files that are named as
    Market-1501's, the number after _c, junk (-1) being dropped and 0 distractors. Identities and cameras with the same
    name are the same in every split.

    Raises:
        AbsentError: a needed split is missing or has no image.
        UserError: a file is not where it must be or names no camera.
    """
    crops = by_split(lambda split: list(crops_of(root / split)), needed, optional)
    every = [crop for part in crops.values() for crop in part]
    names = sorted({crop.identity for crop in every if crop.identity is not None})
    identities = {name: number for number, name in enumerate([None, *names], start=DISTRACTOR)}
    cameras = numbers(sorted({crop.camera for crop in every}))

    def numbered(crop: Crop) -> Image:
        return Image(crop.path, identities[crop.identity], cameras[crop.camera], crop.identity or "", crop.camera)

    return ReidSet(**{split: list(map(numbered, part)) for split, part in crops.items()})


def crops_of(folder: Path) -> Iterator[Crop]:
    """The images of one split, without junk."""
    for path in image_files(folder):
        parts = path.relative_to(folder).parts
        camera, underscore, _ = path.name.partition("_")
        market = NAME.match(path.name)
        if len(parts) != 2 or not underscore or not camera:
            raise UserError(f"image {path} must lie at {folder}/<identity>/<camera>_<anything>{path.suffix}")
        if market is None:
            yield Crop(path, parts[0], camera)
        elif int(market["identity"]) != JUNK:
            who = None if int(market["identity"]) == DISTRACTOR else parts[0]
            yield Crop(path, who, str(int(market["camera"])))


def numbers(names: list[str]) -> dict[str, int]:
    """A number for each camera's name: the name itself where all are different numbers, else its place among them."""
    own = {name: int(name) for name in names if re.fullmatch("[0-9]{1,18}", name)}
    return own if len(set(own.values())) == len(names) else {name: number for number, name in enumerate(names)}

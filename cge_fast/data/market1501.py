"""The folder format of Market-1501 (Zheng et al. 2015)."""

import re
from pathlib import Path

from cge_fast.data.counts import Counts
from cge_fast.data.images import Image, ReidSet, image_files
from cge_fast.errors import UserError

NAME = re.compile(r"(?P<identity>-?\d+)_c(?P<camera>\d+)")  # 0002_c1s1_000451_03.jpg
SPLITS = ("bounding_box_train", "query", "bounding_box_test")
JUNK = -1  # boxes without a person; 0 are distractors: people who are nobody's match, kept in the gallery

# 3,819 of the 19,732 files in bounding_box_test are junk; of the rest, 2,798 are distractors.
PUBLISHED = {"train": Counts(751, 12_936, 6), "query": Counts(750, 3_368, 6), "gallery": Counts(751, 15_913, 6)}


def read_market1501(root: Path) -> ReidSet:
    """Reads bounding_box_train, query and bounding_box_test below `root`, jpg or png; junk images (-1) are dropped.

    Raises:
        UserError: a folder is missing or has no image, or a file name does not say identity and camera.
    """
    return ReidSet(*(read_split(root / split) for split in SPLITS))


def read_split(folder: Path) -> list[Image]:
    """The images of one folder, sorted by name, without junk."""
    images = []
    for path in image_files(folder):
        name = NAME.match(path.name)
        if name is None:
            raise UserError(f"image {path} must be named like 0002_c1s1_000451_03.jpg (identity, camera)")
        images.append(Image(path, int(name["identity"]), int(name["camera"])))
    kept = [image for image in images if image.identity != JUNK]
    if not kept:
        raise UserError(f"data.root: {folder} holds only junk images (identity -1)")
    return kept

"""The folder format of Market-1501 (Zheng et al. 2015), which others took over."""

import re
from pathlib import Path

from cge_fast.data.images import Image, Split, reader
from cge_fast.data.walk import AbsentError, image_files, of_a_tool
from cge_fast.errors import UserError

NAME = re.compile(r"(?P<identity>-1|[0-9]{1,18})_c(?P<camera>[0-9]{1,18})(?![0-9])")  # 0002_c1s1_000451_03.jpg
FOLDERS: dict[Split, str] = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
JUNK = -1  # boxes without a person
DISTRACTOR = 0  # people who are nobody's match, kept in the gallery


def market1501(root: Path, split: Split) -> list[Image]:
    """One split's folder below `root`, or below the one folder in it that has them, by name; without junk (-1).

    Raises:
        AbsentError: the folder is missing or has no image.
        UserError: a file name does not say identity and camera.
    """
    folder = with_folders(root) / FOLDERS[split]
    images = []
    for path in image_files(folder):
        name = NAME.match(path.name)
        if name is None:
            raise UserError(f"image {path} must be named like 0002_c1s1_000451_03.jpg (identity, camera)")
        images.append(Image(path, int(name["identity"]), int(name["camera"])))
    kept = [image for image in images if image.identity != JUNK]
    if not kept:
        raise AbsentError(f"data.root: {folder} holds only junk images (identity -1)")
    return kept


def with_folders(root: Path) -> Path:
    """`root`, or the only folder in it that holds the format's folders where `root` itself holds none."""

    def holds_some(folder: Path) -> bool:
        return any((folder / name).is_dir() for name in FOLDERS.values())

    if holds_some(root) or not root.is_dir():
        return root
    inner = [folder for folder in root.iterdir() if not of_a_tool(folder.name) and holds_some(folder)]
    return inner[0] if len(inner) == 1 else root


read_market1501 = reader(market1501)

"""MSMT17 (Wei, Zhang, Gao, Tian 2018), as its archives MSMT17_V1 and MSMT17_V2 (faces blurred) unpack."""

import re
from collections.abc import Sequence
from pathlib import Path

from cge_fast.data.counts import Counts
from cge_fast.data.images import Image, ReidSet, all_there, file_at
from cge_fast.errors import UserError

LINE = re.compile(r"(?P<file>\S+/\d+_\d+_(?P<camera>\d+)_\S+) (?P<identity>\d+)")
CAMERAS = range(1, 16)
TRAIN_IDENTITIES = 1_041

TEST = {"query": Counts(3_060, 11_659, 15), "gallery": Counts(3_060, 82_161, 15)}
PUBLISHED = {"train": Counts(TRAIN_IDENTITIES, 32_621, 15), **TEST}
PUBLISHED_TRAIN_ONLY = {"train": Counts(TRAIN_IDENTITIES, 30_248, 15), **TEST}


def read_msmt17(root: Path, train_lists: Sequence[str] = ("list_train.txt", "list_val.txt")) -> ReidSet:
    """Reads the images of the lists; those of the training lists are of the same people.

    The archive numbers both training and test identities from 0. They are different people, so the test identities
    continue where the training identities end; here all are numbered from 1, since elsewhere 0 is for distractors.

    Raises:
        UserError: a list, a folder or a listed image is missing, or a line does not say camera and identity.
    """
    folders = ("mask_train_v2", "mask_test_v2") if (root / "mask_train_v2").is_dir() else ("train", "test")
    train, test = (root / folder for folder in folders)
    return ReidSet(
        train=[image for name in train_lists for image in read_list(root / name, train, first_identity=1)],
        query=read_list(root / "list_query.txt", test, first_identity=TRAIN_IDENTITIES + 1),
        gallery=read_list(root / "list_gallery.txt", test, first_identity=TRAIN_IDENTITIES + 1),
    )


def read_list(file: Path, folder: Path, first_identity: int) -> list[Image]:
    """The images below `folder` that the list `file` names, in its order."""
    images = []
    for line in file_at(file).read_text(encoding="utf-8", errors="replace").splitlines():
        said = LINE.fullmatch(line.strip())
        if said is None or int(said["camera"]) not in CAMERAS:
            raise UserError(
                f"{file}: the line {line!r} must be like '0000/0000_000_01_0303morning_0015_0.jpg 0' (third the "
                "camera, 1 to 15; last the identity)"
            )
        images.append(Image(folder / said["file"], first_identity + int(said["identity"]), int(said["camera"])))
    return all_there(images, folder, file)

"""VeRi-776 (Liu, Liu, Mei, Ma 2016), vehicles, as its archive VeRi unpacks."""

import re
from pathlib import Path
from xml.etree import ElementTree

from cge_fast.data.counts import Counts
from cge_fast.data.images import Image, ReidSet, all_there, file_at
from cge_fast.errors import UserError

NAME = re.compile(r"(?P<identity>\d+)_c(?P<camera>\d+)_\S+")  # 0001_c001_00016450_0.jpg
CAMERAS = range(1, 21)
PUBLISHED = {"train": Counts(576, 37_778, 20), "query": Counts(200, 1_678, 19), "gallery": Counts(200, 11_579, 19)}

Labels = dict[str, tuple[int, int]]  # image name: identity, camera


def read_veri776(root: Path) -> ReidSet:
    """Reads the images that name_train.txt, name_query.txt and name_test.txt list.

    Raises:
        UserError: a list, a label file, a folder or a listed image is missing or not in its format, or an image's
            label is another one than its name says.
    """
    train, test = (read_labels(file_at(root / f"{split}_label.xml")) for split in ("train", "test"))
    return ReidSet(read_split(root, "train", train), read_split(root, "query", test), read_split(root, "test", test))


def read_labels(file: Path) -> Labels:
    """The labels of an XML file."""
    # Python's parser does not know gb2312, which the files declare, so they are decoded before.
    text = file.read_text(encoding="gb2312", errors="replace")
    try:
        return {
            item.attrib["imageName"]: (int(item.attrib["vehicleID"]), int(item.attrib["cameraID"].removeprefix("c")))
            for item in ElementTree.fromstring(text).iter("Item")
        }
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise UserError(
            f"{file}: each Item must have an imageName, a vehicleID like 0001 and a cameraID like c001 ({error!r})"
        ) from error


def read_split(root: Path, split: str, labels: Labels) -> list[Image]:
    """The images of one split, in its list's order.

    The archive's labels leave out 32 training images, so a label is not required: it must say what the name says.
    """
    file, folder = file_at(root / f"name_{split}.txt"), root / f"image_{split}"
    images = []
    for name in file.read_text(encoding="utf-8", errors="replace").split():
        said = NAME.fullmatch(name)
        if said is None or int(said["camera"]) not in CAMERAS:
            raise UserError(f"{file}: the image {name} must be named like 0001_c001_00016450_0.jpg, camera 1 to 20")
        named = int(said["identity"]), int(said["camera"])
        labelled = labels.get(name, named)
        if labelled != named:
            raise UserError(
                f"image {name} of {file}: its label says vehicle {labelled[0]} and camera {labelled[1]}, its name "
                f"vehicle {named[0]} and camera {named[1]}"
            )
        images.append(Image(folder / name, *named))
    return all_there(images, folder, file)

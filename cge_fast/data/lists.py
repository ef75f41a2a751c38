"""Data sets whose archives hold lists of their images: MSMT17, VeRi-776, VehicleID and VERI-Wild.

Each function reads one split and raises what `read_list` raises.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from cge_fast.data.images import Image, Split
from cge_fast.data.walk import AbsentError, file_at, missing
from cge_fast.errors import UserError

NUMBER = "[0-9]{1,18}"  # what 64 bits hold


class Form(NamedTuple):
    """Of a list's lines."""

    line: str  # a regular expression with the groups file, identity and camera
    like: str  # an example
    cameras: Collection[int] = range(2**63)
    suffix: str = ""  # of the files, which the lines leave out


MSMT17 = Form(
    rf"(?P<file>\S+/[0-9]+_[0-9]+_(?P<camera>{NUMBER})_\S+) (?P<identity>{NUMBER})",
    "'0000/0000_000_01_0303morning_0015_0.jpg 0' (third the camera, 1 to 15; last the identity)",
    range(1, 16),
)
MSMT17_TRAIN_IDENTITIES = 1_041
VERI776 = Form(
    rf"(?P<file>(?P<identity>{NUMBER})_c(?P<camera>{NUMBER})_\S+)",
    "'0001_c001_00016450_0.jpg' (identity, camera 1 to 20)",
    range(1, 21),
)
VEHICLEID = Form(
    rf"(?P<file>(?P<camera>{NUMBER})) (?P<identity>{NUMBER})", "'0116480 11' (image, identity)", suffix=".jpg"
)
VERI_WILD = Form(  # of a line of vehicle_info.txt
    rf"(?P<file>(?P<identity>{NUMBER})/{NUMBER});(?P<camera>{NUMBER})(;.*)?",
    "'00001/000001' (identity, image) and stand in vehicle_info.txt with its camera",
    suffix=".jpg",
)


def read_list(file: Path, folder: Path, form: Form, known: Mapping[str, str] | None = None) -> list[Image]:
    """The images below `folder` that the list `file` names, in its order; `known` has the whole of shortened lines.

    Raises:
        AbsentError: the list or the folder is missing, or the list is empty.
        UserError: a line is of another form or leads out of the folder, or an image is missing.
    """
    images = []
    for line in lines_of(file):
        said = re.fullmatch(form.line, (known or {}).get(line, line))
        if said is None or int(said["camera"]) not in form.cameras:
            raise UserError(f"{file}: the line {line!r} must be like {form.like}")
        name = PurePosixPath(said["file"] + form.suffix)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{file}: the line {line!r} must name a file below {folder}")
        images.append(Image(folder / name, int(said["identity"]), int(said["camera"])))
    if not folder.is_dir():
        raise missing("folder", folder)
    if not images:
        raise AbsentError(f"{file} lists no image: the archive is not whole")
    for image in images:
        if not image.path.is_file():
            raise UserError(f"image {image.path} is missing, but {file} lists it: the archive is not whole")
    return images


def lines_of(file: Path) -> list[str]:
    """The lines of a file, without empty ones; AbsentError if there is no such file."""
    text = file_at(file).read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def msmt17(root: Path, split: Split, train_lists: Sequence[str] = ("list_train.txt", "list_val.txt")) -> list[Image]:
    """MSMT17 (Wei, Zhang, Gao, Tian 2018), as its archives MSMT17_V1 and MSMT17_V2 (faces blurred) unpack.

    The archive numbers both training and test identities from 0. They are different people, so the test identities
    continue where the training identities end; here all are numbered from 1, since elsewhere 0 is for distractors.
    """
    training = split == "train"
    folder, first = ("train", 1) if training else ("test", MSMT17_TRAIN_IDENTITIES + 1)
    if (root / f"mask_{folder}_v2").is_dir():
        folder = f"mask_{folder}_v2"
    files = train_lists if training else [f"list_{split}.txt"]
    images = [image for file in files for image in read_list(root / file, root / folder, MSMT17)]
    return [Image(image.path, first + image.identity, image.camera) for image in images]


def veri776(root: Path, split: Split) -> list[Image]:
    """VeRi-776 (Liu, Liu, Mei, Ma 2016), vehicles, as its archive VeRi unpacks; the names say what its labels say."""
    name = "test" if split == "gallery" else split
    return read_list(root / f"name_{name}.txt", root / f"image_{name}", VERI776)


def vehicleid(root: Path, split: Split, vehicles: int) -> list[Image]:
    """VehicleID (Liu, Tian, Yang, Pang, Huang 2016) with the test list of so many vehicles: 800, 1600 or 2400.

    The archive names no cameras, so every image counts as of one of its own. One image of each test vehicle is the
    gallery, drawn once with seed 0 (the protocol averages over ten drawings), and the others are queries.
    """
    name = "train_list.txt" if split == "train" else f"test_list_{vehicles}.txt"
    images = read_list(root / "train_test_split" / name, root / "image", VEHICLEID)
    if split == "train":
        return images
    places: dict[int, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.identity, []).append(place)
    random = np.random.default_rng(0)
    drawn = {of_vehicle[random.integers(len(of_vehicle))] for of_vehicle in places.values()}
    return [image for place, image in enumerate(images) if (place in drawn) == (split == "gallery")]


def veri_wild(root: Path, split: Split, vehicles: int) -> list[Image]:
    """VERI-Wild (Lou, Bai, Liu, Wang, Duan 2019) with the test lists of so many vehicles: 3000, 5000 or 10000."""
    lists = root / "train_test_split"
    name = {"train": "train_list", "query": f"test_{vehicles}_query", "gallery": f"test_{vehicles}"}[split]
    known = {line.partition(";")[0]: line for line in lines_of(lists / "vehicle_info.txt")}
    return read_list(lists / f"{name}.txt", root / "images", VERI_WILD, known)

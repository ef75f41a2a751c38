"""CUHK03 (Li, Zhao, Xiao, Wang 2014), extracted once from cuhk03_release/cuhk-03.mat, as the archive unpacks.

The new protocol, 767/700 identities (Zhong, Zheng, Cao, Li 2017), also needs its files
cuhk03_new_protocol_config_detected.mat and cuhk03_new_protocol_config_labeled.mat beside cuhk03_release. The classic
one, 1,367/100 identities, is in the archive: 20 splits, of which the first is taken.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from cge_fast.data.images import SPLITS, Image, Split
from cge_fast.data.market1501 import FOLDERS, market1501
from cge_fast.data.walk import file_at
from cge_fast.errors import UserError
from cge_fast.files import new_folder, once
from cge_fast.progress import progress

Entry = tuple[str, int, int]  # name, identity and camera of an image


def cuhk03(root: Path, split: Split, boxes: str, classic: bool = False) -> list[Image]:
    """One split of cuhk03_release/images_`boxes`, or images_`boxes`_classic, which the first call extracts.

    Raises:
        UserError: a .mat file is missing or not in its format, the protocol names an image that the archive does not
            hold, what was extracted is no longer whole, or h5py or scipy is not installed.
    """
    images = root / "cuhk03_release" / f"images_{boxes}{'_classic' if classic else ''}"
    once(images, partial(extract, root, boxes, classic))
    return market1501(images, split)


def extract(root: Path, boxes: str, classic: bool, folder: Path) -> None:
    """Writes the protocol's images as PNG to `folder`, with a progress bar; raises what `cuhk03` raises."""
    try:  # here, since reading what is extracted does not need them
        import h5py
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("data.name: CUHK03 needs h5py and scipy: pip install 'cge-fast[cuhk03]'") from error
    archive = file_at(root / "cuhk03_release" / "cuhk-03.mat")
    protocol = archive if classic else file_at(root / f"cuhk03_new_protocol_config_{boxes}.mat")
    try:
        opened = h5py.File(archive)
    except OSError as error:
        raise UserError(f"{archive} is not a whole MATLAB 7.3 file ({error})") from error
    with opened as mat:
        try:
            entries_of = classic_protocol(mat, boxes) if classic else new_protocol(loadmat(protocol))
        except Exception as error:  # what loadmat raises for a damaged file has no common base
            raise UserError(f"{protocol} does not hold the protocol of CUHK03 ({error!r})") from error
        bar = progress(what=f"extracting {boxes} boxes", unit="images", total=sum(map(len, entries_of.values())))
        with new_folder(folder) as unfinished, bar:
            for split, entries in entries_of.items():
                (unfinished / FOLDERS[split]).mkdir()
                for name, identity, camera in entries:
                    try:
                        picture = read_picture(mat, boxes, name)
                    except (KeyError, ValueError, IndexError, TypeError, OSError) as error:
                        raise UserError(f"{archive} does not hold the protocol's image {name} ({error})") from error
                    picture.save(unfinished / FOLDERS[split] / f"{identity:04d}_c{camera}_{name}")
                    bar.update()


def new_protocol(protocol: Mapping[str, np.ndarray]) -> dict[Split, list[Entry]]:
    """The entries of each split in the protocol's file."""
    names = [str(cell.item()) for cell in protocol["filelist"].flat]
    identities, cameras, *indices = (
        protocol[field].ravel().astype(int).tolist()
        for field in ("labels", "camId", "train_idx", "query_idx", "gallery_idx")
    )
    entries = list(zip(names, identities, cameras, strict=True))
    return {split: [entries[index - 1] for index in chosen] for split, chosen in zip(SPLITS, indices, strict=True)}


def classic_protocol(mat: Any, boxes: str) -> dict[Split, list[Entry]]:
    """The entries of the archive's first split.

    Queries are a test identity's images of the first view; of the second view one is the gallery, drawn once (the
    protocol averages over 100 drawings).
    """
    test = {(int(pair), int(person)) for pair, person in mat[mat["testsets"][0, 0]][()].T}
    random = np.random.default_rng(0)
    entries: dict[Split, list[Entry]] = {split: [] for split in SPLITS}
    for identity, (pair, person, names) in enumerate(people(mat, boxes), start=1):
        views = {view: [(name, identity, view) for name in names if int(name[6]) == view] for view in (1, 2)}
        if (pair, person) not in test:
            entries["train"] += views[1] + views[2]
        elif views[2]:
            entries["query"] += views[1]
            entries["gallery"].append(views[2][random.integers(len(views[2]))])
    return entries


def people(mat: Any, boxes: str) -> Iterator[tuple[int, int, list[str]]]:
    """Camera pair, number in it, both from 1, and the names of the images of everybody, in the archive's order."""
    for pair, reference in enumerate(mat[boxes][0], start=1):
        cells = mat[reference][()]  # (10 images, people)
        for person in range(1, cells.shape[1] + 1):
            names = (f"{pair}_{person:03d}_{1 if number <= 5 else 2}_{number:02d}.png" for number in range(1, 11))
            there = zip(names, cells[:, person - 1], strict=True)
            yield pair, person, [name for name, cell in there if mat[cell].ndim == 3]


def read_picture(mat: Any, boxes: str, name: str) -> PIL.Image.Image:
    """The image that the protocol calls <camera pair>_<person>_<side>_<number>.png, each counted from 1."""
    pair, person, _, number = (int(part) for part in name.removesuffix(".png").split("_"))
    people = mat[mat[boxes][0, pair - 1]]
    pixels = mat[people[number - 1, person - 1]][()]  # (3, width, height): MATLAB's order of axes is reversed
    if pixels.ndim != 3:
        raise ValueError("the entry is empty")
    return PIL.Image.fromarray(pixels.transpose())

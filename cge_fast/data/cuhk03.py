"""CUHK03 (Li, Zhao, Xiao, Wang 2014) with the new protocol, 767/700 identities (Zhong, Zheng, Cao, Li 2017).

The folder holds cuhk03_release/cuhk-03.mat, as the archive unpacks, and beside cuhk03_release the protocol's files
cuhk03_new_protocol_config_detected.mat and cuhk03_new_protocol_config_labeled.mat.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from tqdm import tqdm

from cge_fast.data.counts import Counts
from cge_fast.data.images import ReidSet, file_at
from cge_fast.data.market1501 import SPLITS, read_market1501
from cge_fast.data.whole_folder import once, whole_folder
from cge_fast.errors import UserError

Boxes = Literal["detected", "labeled"]

PUBLISHED = {
    "detected": {"train": Counts(767, 7_365, 2), "query": Counts(700, 1_400, 2), "gallery": Counts(700, 5_332, 2)},
    "labeled": {"train": Counts(767, 7_368, 2), "query": Counts(700, 1_400, 2), "gallery": Counts(700, 5_328, 2)},
}


def read_cuhk03(root: Path, boxes: Boxes) -> ReidSet:
    """Reads root/cuhk03_release/images_`boxes`, which the first call extracts, in Market-1501's format.

    Raises:
        UserError: a .mat file is missing or not in its format, the protocol names an image that the archive does not
            hold, or h5py or scipy is not installed.
    """
    images = root / "cuhk03_release" / f"images_{boxes}"
    once(images, partial(extract, root, boxes))
    return read_market1501(images)


def extract(root: Path, boxes: Boxes, folder: Path) -> None:
    """Writes the protocol's images as PNG to `folder`, with a progress bar; raises what `read_cuhk03` raises."""
    try:  # here, since reading what is extracted does not need them
        import h5py
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError("data.name: CUHK03 needs h5py and scipy: pip install 'cge-fast[cuhk03]'") from error
    archive = file_at(root / "cuhk03_release" / "cuhk-03.mat")
    protocol = file_at(root / f"cuhk03_new_protocol_config_{boxes}.mat")
    try:
        entries_of = protocol_entries(loadmat(protocol))
    except Exception as error:  # what loadmat raises for a damaged file has no common base
        raise UserError(f"{protocol} is not the new protocol of CUHK03 ({error!r})") from error
    try:
        opened = h5py.File(archive)
    except OSError as error:
        raise UserError(f"{archive} is not a whole MATLAB 7.3 file ({error})") from error
    progress = tqdm(desc=f"extracting {boxes} boxes", total=sum(map(len, entries_of.values())), unit=" image")
    with opened as mat, whole_folder(folder) as unfinished, progress:
        for split, entries in entries_of.items():
            (unfinished / split).mkdir()
            for name, identity, camera in entries:
                try:
                    picture = read_picture(mat, boxes, name)
                except (KeyError, ValueError, IndexError, TypeError, OSError) as error:
                    raise UserError(f"{archive} does not hold the protocol's image {name} ({error})") from error
                picture.save(unfinished / split / f"{identity:04d}_c{camera}_{name}")
                progress.update()


def protocol_entries(protocol: Mapping[str, np.ndarray]) -> dict[str, list[tuple[str, int, int]]]:
    """Name, identity and camera of each image, by the folder of Market-1501 where it belongs."""
    names = [str(cell.item()) for cell in protocol["filelist"].flat]
    identities, cameras, *indices = (
        protocol[field].ravel().astype(int).tolist()
        for field in ("labels", "camId", "train_idx", "query_idx", "gallery_idx")
    )
    entries = list(zip(names, identities, cameras, strict=True))
    return {split: [entries[index - 1] for index in chosen] for split, chosen in zip(SPLITS, indices, strict=True)}


def read_picture(mat: Any, boxes: Boxes, name: str) -> PIL.Image.Image:
    """The image that the protocol calls <camera pair>_<person>_<side>_<number>.png, each counted from 1."""
    pair, person, _, number = (int(part) for part in name.removesuffix(".png").split("_"))
    people = mat[mat[boxes][0, pair - 1]]
    pixels = mat[people[number - 1, person - 1]][()]  # (3, width, height): MATLAB's order of axes is reversed
    if pixels.ndim != 3:
        raise ValueError("the entry is empty")
    return PIL.Image.fromarray(pixels.transpose())

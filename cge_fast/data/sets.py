"""From the name of a data set to its images."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cge_fast.data import cuhk03, market1501, msmt17, veri776
from cge_fast.data.counts import SetCounts
from cge_fast.data.folder import read_folder
from cge_fast.data.images import ReidSet, without_corrupt
from cge_fast.data.pedestrians import draw
from cge_fast.data.whole_folder import once
from cge_fast.errors import UserError
from cge_fast.options import DataConfig

DRAWING = 1  # number of the embedded sets' present drawing: a change of the pixels takes the next

# Sets that are read from a folder: their readers, and the counts that were published of them.
SETS: dict[str, tuple[Callable[[Path], ReidSet], SetCounts | None]] = {
    "market1501": (market1501.read_market1501, market1501.PUBLISHED),
    "msmt17": (msmt17.read_msmt17, msmt17.PUBLISHED),
    "msmt17-train-only": (partial(msmt17.read_msmt17, train_lists=("list_train.txt",)), msmt17.PUBLISHED_TRAIN_ONLY),
    "cuhk03-detected": (partial(cuhk03.read_cuhk03, boxes="detected"), cuhk03.PUBLISHED["detected"]),
    "cuhk03-labeled": (partial(cuhk03.read_cuhk03, boxes="labeled"), cuhk03.PUBLISHED["labeled"]),
    "veri776": (veri776.read_veri776, veri776.PUBLISHED),
    "folder": (read_folder, None),
}


def read(config: DataConfig) -> ReidSet:
    """The images of the data set that `config` names.

    Raises:
        UserError: the root is missing or does not hold such a set, or its gallery has nothing to find.
    """
    if config.name in ("pedestrians", "pedestrians-trap"):
        if config.root:
            raise UserError(f"data.root: {config.root} is not read, {config.name} is drawn; give data.name too")
        reid_set = market1501.read_market1501(pedestrians(trap=config.name == "pedestrians-trap"))
    elif config.root is None:
        raise UserError(f"data.root: the data set {config.name} needs the folder where it lies")
    else:
        reader, _ = SETS[config.name]
        reid_set = reader(config.root)
    if config.skip_corrupt:
        reid_set, corrupt = without_corrupt(reid_set)
        print(f"left out {len(corrupt)} corrupt images" + "".join(f"\n  {path}" for path in corrupt), file=sys.stderr)
        for split in ("train", "query", "gallery"):
            if not getattr(reid_set, split):
                raise UserError(f"data.root: the {split} split of {config.name} holds no readable image")
    cameras_of = defaultdict(set)
    for image in reid_set.gallery:
        cameras_of[image.identity].add(image.camera)
    if not any(cameras_of[query.identity] - {query.camera} for query in reid_set.query):
        raise UserError("data.root: the gallery has no query's identity from another camera, there is nothing to find")
    return reid_set


def pedestrians(trap: bool = False, seed: int = 0) -> Path:
    """The folder of an embedded set, drawn now if it is not in the cache ($CGE_CACHE, or ~/.cache/cge-fast)."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = Path(os.environ.get("CGE_CACHE", home / "cge-fast"))
    folder = cache / f"pedestrians{'-trap' if trap else ''}-{DRAWING}{f'-seed-{seed}' if seed else ''}"
    once(folder, partial(draw, trap=trap, seed=seed))
    return folder

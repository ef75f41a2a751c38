"""From the name of a data set to its images."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from cge_fast.data import lists
from cge_fast.data.counts import Counts, SetCounts
from cge_fast.data.cuhk03 import cuhk03
from cge_fast.data.folder import read_folder
from cge_fast.data.held_out import with_held_out
from cge_fast.data.images import SPLITS, Reader, ReidSet, Split, reader, without_corrupt
from cge_fast.data.market1501 import DISTRACTOR, read_market1501
from cge_fast.data.pedestrians import draw
from cge_fast.data.walk import AbsentError, first_few
from cge_fast.errors import UserError, notice
from cge_fast.files import cache_home, once
from cge_fast.options import DataConfig

DRAWN = ("pedestrians", "pedestrians-trap")
DRAWING = 1  # number of the embedded sets' present drawing: a change of the pixels takes the next


def counts(*splits: tuple[int, int | None, int | None]) -> SetCounts:
    """Published identities, images and cameras of train, query and gallery; None is not published."""
    return {split: Counts(*numbers) for split, numbers in zip(SPLITS, splits, strict=True)}


MSMT17_TEST = (3_060, 11_659, 15), (3_060, 82_161, 15)

# Sets that are read from a folder: their readers, and the counts that were published of them. Of Market-1501's 19,732
# files in bounding_box_test 3,819 are junk; of the rest, 2,798 are distractors.
SETS: dict[str, tuple[Reader, SetCounts | None]] = {
    "market1501": (read_market1501, counts((751, 12_936, 6), (750, 3_368, 6), (751, 15_913, 6))),
    "dukemtmc": (read_market1501, counts((702, 16_522, 8), (702, 2_228, 8), (1_110, 17_661, 8))),
    "occluded-duke": (read_market1501, counts((702, 15_618, 8), (519, 2_210, 8), (1_110, 17_661, 8))),
    "msmt17": (reader(lists.msmt17), counts((1_041, 32_621, 15), *MSMT17_TEST)),
    "msmt17-train-only": (
        reader(partial(lists.msmt17, train_lists=["list_train.txt"])),
        counts((1_041, 30_248, 15), *MSMT17_TEST),
    ),
    "veri776": (reader(lists.veri776), counts((576, 37_778, 20), (200, 1_678, 19), (200, 11_579, 19))),
    "folder": (read_folder, None),
    "market": (read_market1501, None),
}
for boxes, train, gallery in (("detected", 7_365, 5_332), ("labeled", 7_368, 5_328)):
    SETS |= {
        f"cuhk03-{boxes}": (
            reader(partial(cuhk03, boxes=boxes)),
            counts((767, train, 2), (700, 1_400, 2), (700, gallery, 2)),
        ),
        f"cuhk03-{boxes}-classic": (
            reader(partial(cuhk03, boxes=boxes, classic=True)),
            counts((1_367, None, 2), (100, None, 1), (100, 100, 1)),
        ),
    }
for number, test in ((800, 6_493), (1600, 13_377), (2400, 19_777)):
    SETS[f"vehicleid-{number}"] = (
        reader(partial(lists.vehicleid, vehicles=number)),
        counts((13_164, 113_346, None), (number, test - number, None), (number, number, None)),
    )
for number, test in ((3000, 41_861), (5000, 69_389), (10000, 138_517)):
    SETS[f"veri-wild-{number}"] = (
        reader(partial(lists.veri_wild, vehicles=number)),
        counts((30_671, 277_797, None), (number, number, None), (number, test - number, None)),
    )


def each_set(config: DataConfig) -> list[DataConfig]:
    """The settings of each of the data sets that `config` names, like a+b; of one set, themselves.

    data.root is one folder for all, or one for each, like A+B. What is drawn has none.

    Raises:
        UserError: a name is unknown, or there are other numbers of names and roots.
    """
    names = config.name.split("+")
    if len(names) == 1:
        return [config]
    roots = config.roots
    if len(roots) == 1:
        roots *= len(names)
    for name in names:
        if name not in (*DRAWN, *SETS):
            raise UserError(f"data.name: there is no data set {name}, but {', '.join((*DRAWN, *SETS))}")
    if roots and len(roots) != len(names):
        raise UserError(f"data.root: must be one folder for all, or {len(names)} like A+B, got {len(roots)}")
    return [
        replace(config, name=name, root=None if name in DRAWN else root) for name, root in zip_longest(names, roots)
    ]


def read(config: DataConfig, needed: Collection[Split] = SPLITS, optional: Collection[Split] = ()) -> ReidSet:
    """The images of the data set that `config` names: the splits that are needed, and the optional ones if there.

    Raises:
        UserError: the root is missing or does not hold such a set, a needed split has no image, people of a published
            set's training are in its test, or query and gallery are needed and have nothing to find.
    """
    if "+" in config.name:
        return together(config, needed, optional)
    if config.name in DRAWN:
        if config.root:
            raise UserError(f"data.root: {config.root} is not read, {config.name} is drawn; give data.name too")
        reid_set = read_market1501(pedestrians(trap=config.name == "pedestrians-trap"), needed, optional)
    elif config.root is None:
        raise UserError(f"data.root: the data set {config.name} needs the folder where it lies")
    else:
        read_set, published = SETS[config.name]
        if config.held_out and published is None:
            read_set = partial(with_held_out, read_set, config.held_out)
        reid_set = read_set(Path(config.root), needed, optional)
    if config.skip_corrupt:
        reid_set, corrupt = without_corrupt(reid_set)
        notice(f"left out {len(corrupt)} corrupt images" + (f": {first_few(corrupt)}" if corrupt else ""))
        for split in needed:
            if not getattr(reid_set, split):
                raise AbsentError(f"data.root: the {split} split of {config.name} holds no readable image")
    check_people(config.name, reid_set)
    why = nothing_to_find(reid_set)
    if why and "query" in needed and "gallery" in needed:
        raise UserError(f"data.root: {why}")
    return reid_set


def together(config: DataConfig, needed: Collection[Split], optional: Collection[Split]) -> ReidSet:
    """The first of several sets, to whose training images those of the others are added: other people and cameras.

    Raises:
        UserError: `read` or `each_set` does, or a set is there twice.
    """
    configs = each_set(config)
    if len({(each.name, each.root) for each in configs}) < len(configs):
        raise UserError(f"data.name: each set can be there once, got {config.name}")
    first = read(configs[0], needed, optional)
    if "train" not in {*needed, *optional}:
        return first
    train, test = list(first.train), first.query + first.gallery
    for other in configs[1:]:
        identities, cameras = (1 + max(getattr(image, key) for image in train + test) for key in ("identity", "camera"))
        added = read(other, ["train"]).train
        lowest = min(image.identity for image in added), min(image.camera for image in added)
        train += [
            replace(
                image,
                identity=identities + image.identity - lowest[0],
                camera=cameras + image.camera - lowest[1],
            )
            for image in added
        ]
    return ReidSet(train, first.query, first.gallery)


def check_people(name: str, reid_set: ReidSet) -> None:
    """Says how many people are both in training and in the test; UserError if it is a published set, which has none."""
    train, query, gallery = ({image.identity for image in part} for part in vars(reid_set).values())
    both = len(train & (query | gallery) - {DISTRACTOR})
    if both:
        said = f"data.root: {both} people are both in training and in the test"
        if name not in SETS or SETS[name][1]:
            raise UserError(f"{said}, which {name} separates: the archive is mixed up (own sets: --data.name market)")
        notice(f"{said}: the figures of the evaluation will be too good")


def nothing_to_find(reid_set: ReidSet) -> str | None:
    """Why a set cannot be evaluated, and what would help; None if it can."""
    empty = [split for split in ("query", "gallery") if not getattr(reid_set, split)]
    if empty:
        return f"there are no images of {' and '.join(empty)}"
    cameras_of = defaultdict(set)
    for image in reid_set.gallery:
        cameras_of[image.identity].add(image.camera)
    if any(cameras_of[query.identity] - {query.camera} for query in reid_set.query):
        return None
    return (
        "the gallery has no query's identity from another camera, there is nothing to find (a file's name says its "
        "camera: <camera>_<anything> in data.name folder, 0002_c1s1_000451_03.jpg in Market-1501's format)"
    )


def pedestrians(trap: bool = False, seed: int = 0) -> Path:
    """The folder of an embedded set, drawn now if it is not in the cache (`cache_home`)."""
    folder = cache_home() / f"pedestrians{'-trap' if trap else ''}-{DRAWING}{f'-seed-{seed}' if seed else ''}"
    once(folder, partial(draw, trap=trap, seed=seed))
    return folder

"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015) laid out as a re-identification set in Market-1501's format.

Handwritten characters are identities and their drawers are cameras: the training split is images_background_small1,
the test split images_background_small2, with drawers 1-4 as queries and the others as gallery.
"""

from pathlib import Path

import PIL.Image

from cge_fast.data.images import open_rgb
from cge_fast.data.market1501 import FOLDERS
from cge_fast.data.walk import image_files
from cge_fast.errors import UserError
from cge_fast.files import new_folder
from cge_fast.progress import progress

ARCHIVES = ("images_background_small1", "images_background_small2")
SIZE = 64  # pixels; the drawings have 105
CAMERAS = 6
QUERY_DRAWERS = range(1, 5)
JPEG_QUALITY = 90


def export_omniglot(source: Path, folder: Path) -> None:
    """Writes bounding_box_train, query and bounding_box_test below `folder` as 64x64 jpg, with a progress bar.

    Characters are numbered from 1 in the order of alphabet and character, the training archive first; drawer d is
    camera d modulo 6, plus 1.

    Args:
        source: folder with the two archives, unzipped: source/images_background_small1/<alphabet>/<character>/*.png.
        folder: where to write; it must not exist or be empty.

    Raises:
        UserError: an archive is missing, a file is not named like 0394_01.png, or `folder` holds something.
    """
    train, test = (sorted({path.parent for path in image_files(source / archive, "source")}) for archive in ARCHIVES)
    with new_folder(folder) as unfinished:
        for split in FOLDERS.values():
            (unfinished / split).mkdir()
        characters = progress([*train, *test], what="writing characters", unit="characters")
        for identity, character in enumerate(characters, start=1):
            for path in sorted(character.glob("*.png")):
                drawer = path.stem.rpartition("_")[2]
                if not drawer.isdecimal():
                    raise UserError(f"image {path} must be named like 0394_01.png: the drawer stands last")
                split = "query" if int(drawer) in QUERY_DRAWERS else "bounding_box_test"
                name = f"{identity:04d}_c{int(drawer) % CAMERAS + 1}s1_{int(drawer):06d}_01.jpg"
                picture = open_rgb(path).resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR)
                folder_of_split = unfinished / (split if identity > len(train) else "bounding_box_train")
                picture.save(folder_of_split / name, quality=JPEG_QUALITY)

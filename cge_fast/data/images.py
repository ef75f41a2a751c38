"""What a re-identification data set is, and how one of its images is read: one way for every reader."""

import ctypes
import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import PIL.Image
from PIL import ExifTags, ImageOps

from cge_fast.data.walk import AbsentError
from cge_fast.errors import UserError
from cge_fast.progress import progress

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # Pillow has more, some of which start other programs
WHITES = {"I": (255, 65_535), "F": (1, 255, 65_535)}  # what white can be in 32 bits; in 16 it is 65,535
FEWEST_GREYS = 32
LEVELS = {"L;2": 85, "L;4": 17}  # steps between the greys of a PNG of 2 or 4 bits
WHITE_IS_ZERO, PHOTOMETRIC = 0, 262  # value, and number, of a tag of TIFF; Pillow heeds it up to 8 bits

# What there is to say of a damaged picture is in the error, in one line; Pillow and its libtiff print more.
logging.getLogger("PIL").addHandler(logging.NullHandler())
with suppress(OSError, AttributeError):  # a Pillow that was built in another way
    for handler in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        ctypes.CDLL(PIL.Image.core.__file__)[handler](None)

Split = Literal["train", "query", "gallery"]
SPLITS: tuple[Split, ...] = ("train", "query", "gallery")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Image:
    """One image file, who is in it and which camera took it."""

    path: Path
    identity: int
    camera: int
    identity_name: str | None = None  # of a set that names them; of its distractors ""
    camera_name: str | None = None

    @property
    def labels(self) -> tuple[int | str, int | str]:
        """Identity and camera as the set calls them: their names if it names them, else their numbers."""
        names = self.identity_name, self.camera_name
        return self.identity if names[0] is None else names[0], self.camera if names[1] is None else names[1]


@dataclass(frozen=True)
class ReidSet:
    """Training images; queries, and the gallery that they are looked for in. Test identities are other people."""

    train: list[Image]
    query: list[Image]
    gallery: list[Image]


def names(images: Sequence[Image]) -> dict[str, list[str]]:
    """Names of `identities` and `cameras`, each in the order of their numbers, once; empty if none has a name."""
    if all(image.identity_name is None for image in images):
        return {}
    identities = {image.identity: str(image.labels[0]) for image in images}
    cameras = {image.camera: str(image.labels[1]) for image in images}
    called = {"identities": identities, "cameras": cameras}
    return {kind: [name for _, name in sorted(of_number.items())] for kind, of_number in called.items()}


# Its arguments: the folder of a set, the splits that are needed, and those that are read too if they are there.
Reader = Callable[..., ReidSet]


def by_split(
    read: Callable[[Split], list[Item]], needed: Collection[Split], optional: Collection[Split]
) -> dict[str, list[Item]]:
    """What `read` gives for each split; empty for one that is not asked for, or is optional and not there.

    Raises AbsentError if a split that is needed is not there, or none of those that are optional.
    """
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    absent: list[AbsentError] = []
    for split in (split for split in SPLITS if split in needed or split in optional):
        try:
            items[split] = read(split)
        except AbsentError as error:
            if split in needed:
                raise
            absent.append(error)
    if absent and not any(items.values()):
        raise absent[0]
    return items


def reader(read_split: Callable[[Path, Split], list[Image]]) -> Reader:
    """A Reader of sets whose splits are read one by one."""

    def read(root: Path, needed: Collection[Split] = SPLITS, optional: Collection[Split] = ()) -> ReidSet:
        return ReidSet(**by_split(partial(read_split, root), needed, optional))

    return read


def open_rgb(path: Path, size: tuple[int, int] | None = None) -> PIL.Image.Image:
    """Reads an image whole, as RGB and upright as its EXIF says; docs/datasets.md has what becomes of other modes.

    size: width and height that it will be resized to. A JPEG at least four times as large both ways is decoded at a
    half, a quarter or an eighth of its own size, but at no less than twice `size`.

    Raises:
        UserError: the file is missing, empty, damaged, of another format than FORMATS, or has too many pixels.
    """
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            raise OSError("there is no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of damaged metadata
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path, formats=FORMATS) as image:
                with suppress(Exception):  # a damaged EXIF block leaves the pixels whole
                    if size and image.format == "JPEG":
                        turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # by 90 degrees
                        image.draft(None, (2 * size[turned], 2 * size[not turned]))
                level = LEVELS.get(str(image.tile[0][3])) if image.format == "PNG" and image.tile else None
                image.load()
                if level and "transparency" in image.info:
                    image.info["transparency"] *= level  # Pillow scales the pixels alone
                with suppress(Exception):
                    ImageOps.exif_transpose(image, in_place=True)
                return as_rgb(image)
    except Exception as error:  # what Pillow raises for damaged files has no common base
        raise UserError(
            f"image {path} cannot be read ({error}); mend or remove it (trained or evaluated on, such images are left "
            "out with --data.skip_corrupt true)"
        ) from error


def opened(
    picture: Image | Path | str | PIL.Image.Image | np.ndarray, size: tuple[int, int] | None = None
) -> PIL.Image.Image:
    """RGB of a file, which `open_rgb` reads, or of what is in memory: Pillow's image, or an array (H, W, 3) uint8.

    size: as `open_rgb` takes it.

    Raises:
        UserError: a file cannot be read.
        TypeError: it is something else.
    """
    if isinstance(picture, Image | Path | str):
        return open_rgb(picture.path if isinstance(picture, Image) else Path(picture), size)
    if isinstance(picture, PIL.Image.Image):
        return as_rgb(picture)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return PIL.Image.fromarray(picture)
    got = f"{picture.shape} {picture.dtype}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise TypeError(f"an image must be a path, Pillow's, or an array (H, W, 3) uint8, got {got}")


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB of any mode: greyscale of 16 or 32 bits is scaled to 8, what is transparent becomes black."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            values = (65_535 if image.mode.startswith("I;16") else 0) - values
        greys = eight_bits(values, image.mode)
        image = PIL.Image.fromarray(
            np.where(values == image.info.get("transparency", np.nan), 0, greys).astype(np.uint8)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")


def eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Greyscale (H, W) float64 of Pillow's `mode` as uint8: from 0 to white, or from its least to its greatest value.

    The latter if it holds values outside of that range or, as pictures of heat and depth do, would keep few greys.
    """
    if not np.isfinite(values).all():
        raise ValueError("a pixel is not finite")
    least, greatest = values.min(), values.max()
    white = next((white for white in WHITES.get(mode, (65_535,)) if least >= 0 and greatest <= white), None)
    black: float = 0
    if white is None or 0 < (greatest - least) * 255 < white * FEWEST_GREYS:
        black, white = least, greatest
    return ((values - black) * (255 / max(white - black, np.finfo(float).tiny))).round().astype(np.uint8)


def without_corrupt(reid_set: ReidSet) -> tuple[ReidSet, list[Path]]:
    """The set without the images that cannot be read, and those images' paths. Reads every file."""
    corrupt = []
    images = {image.path: image for part in vars(reid_set).values() for image in part}  # one may be in two splits
    for image in progress(images.values(), what="checking images", unit="images"):
        try:
            open_rgb(image.path)
        except UserError:
            corrupt.append(image.path)
    left_out = set(corrupt)
    parts = ([image for image in part if image.path not in left_out] for part in vars(reid_set).values())
    return ReidSet(*parts), corrupt

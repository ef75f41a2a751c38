"""Damaged images and odd folders: each ends in success, a counted skip or one line, whatever it is."""

import io
import os
import random
import shutil

import numpy as np
import PIL.Image
import pytest

from cge_fast import errors
from cge_fast.data import read
from cge_fast.data.__main__ import main
from cge_fast.data.images import open_rgb
from cge_fast.options import DataConfig

NUMBERS = [pytest.param(range(50), id="50"), pytest.param(range(5000), id="5000", marks=pytest.mark.slow)]


def encoded(picture, kind, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def seeds() -> list[bytes]:
    """A small image of every kind that is read, and some that are not."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)
    colour, grey = PIL.Image.fromarray(pixels), pixels[..., 0].astype(np.uint16) * 257
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x829A: 0.01}
    clear = colour.convert("RGBA")
    clear.putalpha(128)
    return [
        encoded(colour, "JPEG", exif=exif),
        encoded(colour.convert("CMYK"), "JPEG", exif=exif, progressive=True),
        *(
            encoded(colour, "PNG", exif=exif, pnginfo=None),
            encoded(clear, "PNG"),
            encoded(PIL.Image.fromarray(grey), "PNG"),
        ),
        *(encoded(colour.convert("P"), "PNG", transparency=3), encoded(colour.convert("1"), "PNG")),
        *(encoded(colour, "WEBP", exif=exif), encoded(clear, "WEBP", lossless=True), encoded(colour, "BMP")),
        *(encoded(colour, "TIFF", compression=how) for how in (None, "tiff_lzw", "jpeg", "packbits")),
        *(encoded(PIL.Image.fromarray(grey.astype(kind)), "TIFF") for kind in (np.int32, np.float32, np.uint16)),
        *(encoded(colour, "GIF"), encoded(colour, "PPM"), encoded(colour, "EPS"), b""),
    ]


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Some bytes other than they were, missing, doubled, or of the header set to an extreme."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8, 40])):
        if not data:
            break
        place = chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 64))
        match chance.randrange(5):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                data[place] = chance.choice([0, 1, 127, 128, 255])
            case 2:
                del data[place : place + chance.randrange(1, 1 + len(data))]
            case 3:
                data[place:place] = data[place : place + chance.randrange(1, 40)]
            case 4:
                data[place : place + 4] = chance.randbytes(4)
    return bytes(data)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_damaged_image_is_read_or_named(tmp_path, numbers):
    path, kinds = tmp_path / "damaged.jpg", seeds()
    for number in numbers:
        chance = random.Random(number)
        path.write_bytes(damaged(chance.choice(kinds), chance))
        try:
            assert open_rgb(path).mode == "RGB", number
        except errors.UserError as error:
            assert "damaged.jpg cannot be read" in str(error), number


NAMES = [
    *(
        "0002",
        "anna",
        "bert",
        "-1",
        "0000",
        "9" * 40,
        "٣",
        "p 1",
        "a\x1b[31mb",
        "ü",
        b"\xff\xfe".decode(errors="surrogateescape"),
    ),
    *(".git", "._x", "__MACOSX", "@eaDir", "Thumbs.db", "lost+found", "query", "..."),
]
FILES = [
    *(
        "c1_1.jpg",
        "c2_1.png",
        "c1_2.JPEG",
        "0002_c1s1_000451_03.jpg",
        "0002_c2_f01.webp",
        "-1_c3s1_1_1.jpg",
        "1_c2s1.bmp",
    ),
    *(
        "0000_c1s1_1.tif",
        "nocamera.jpg",
        "_1.jpg",
        f"{'8' * 30}_c1.jpg",
        f"7_c{'8' * 30}.jpg",
        "c1_\x1b]0;x\x07.jpg",
        "a\nb_1.png",
    ),
    *("._c1_1.jpg", ".DS_Store", "Thumbs.db", "c1_1.gif", "c1_1.heic", "readme.txt", "c1_1", "٣_c٣.jpg"),
]
FOLDERS = ("train", "query", "gallery", "bounding_box_train", "bounding_box_test", "", "Market-1501")


def grow(root, chance: random.Random, kinds: list[bytes]) -> None:
    """A folder that is a data set more or less."""
    small = kinds[2]
    for folder in FOLDERS:
        if chance.random() < 0.3:
            continue
        for _ in range(chance.randrange(1, 5)):
            inner = root / folder / chance.choice([*NAMES, "", ""])
            if inner.is_file():
                continue
            inner.mkdir(parents=True, exist_ok=True)
            for name in chance.sample(FILES, chance.choice([1, 2, 2, 3])):
                path = inner / (name if chance.random() < 0.9 else chance.choice(NAMES))
                if not os.path.lexists(path):
                    path.write_bytes(small if chance.random() < 0.9 else damaged(chance.choice(kinds), chance))
    for _ in range(chance.choice([0, 0, 0, 1, 2])):
        places = [path for path in root.rglob("*") if path.is_dir()]
        if not places:
            return
        path = chance.choice(places) / chance.choice([*NAMES, *FILES])
        if os.path.lexists(path):
            continue
        match chance.randrange(4):
            case 0:
                path.symlink_to(chance.choice([*places, root]), target_is_directory=True)
            case 1:
                path.symlink_to("gone")
            case 2:
                path.symlink_to(path.name)
            case 3:
                os.mkfifo(path)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_an_odd_folder_is_read_or_ends_in_one_line(tmp_path, numbers, capsys):
    kinds, seen = seeds(), set()
    for number in numbers:
        chance, root = random.Random(number), tmp_path / "root"
        root.mkdir()
        grow(root, chance, kinds)
        name = chance.choice(["folder", "market1501"])
        settings = DataConfig(name=name, root=root, skip_corrupt=chance.random() < 0.5)
        calls = [
            lambda name=name, root=root: main([name, "--root", str(root), "--sheet", str(tmp_path / "sheet.png")]),
            lambda settings=settings: read(settings, ["train"], ["query", "gallery"]),
            lambda settings=settings: read(settings, ["query", "gallery"]),
        ]
        for call in calls:
            try:
                errors.run(call, "program")
            except SystemExit as exit_:
                assert exit_.code == 2, number
            printed = capsys.readouterr().err.replace("\r", "\n")
            assert all(char.isprintable() or char == "\n" for char in printed), number
            lines = [line for line in printed.splitlines() if line and "checking images" not in line]
            assert all(line.startswith(("program: error: ", "data.root: ", "left out ")) for line in lines), number
            seen.add("error" if "program: error: " in printed else "read")
        shutil.rmtree(root)
    assert seen == {"error", "read"}

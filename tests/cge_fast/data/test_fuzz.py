"""Damaged images and odd folders: each ends in success, a counted skip or one line, whatever it is."""

import io
import os
import random
import shutil
from contextlib import suppress

import numpy as np
import PIL.Image
import pytest

from cge_fast import errors
from cge_fast.data import read
from cge_fast.data.__main__ import main
from cge_fast.data.images import open_rgb
from cge_fast.options import DataConfig


def seeded(fast: int, slow: int):
    """Runs of so many inputs, made from fixed seeds."""
    slowly = pytest.param(range(slow), id=str(slow), marks=(pytest.mark.slow, pytest.mark.thorough))
    return pytest.mark.parametrize("numbers", [pytest.param(range(fast), id=str(fast)), slowly])


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
    """Some bytes other than they were, missing, doubled, or set to an extreme."""
    data = bytearray(content)
    for _ in range(chance.choice([0, 1, 1, 1, 2, 8])):
        if not data:
            break
        place = chance.randrange(len(data))
        match chance.randrange(6):
            case 0 | 1:
                data[place] ^= 1 << chance.randrange(8)
            case 2:
                data[place] = chance.choice([0, 1, 127, 128, 255])
            case 3:
                del data[place : place + chance.choice([1, 4, len(data)])]
            case 4:
                data[place:place] = data[place : place + chance.randrange(1, 40)]
            case 5:
                data[place : place + 4] = chance.randbytes(4)
    return bytes(data)


@seeded(200, 8000)
def test_a_damaged_image_is_read_or_named(tmp_path, numbers):
    path, kinds = tmp_path / "damaged.jpg", seeds()
    for number in numbers:
        chance = random.Random(number)
        path.write_bytes(damaged(chance.choice(kinds), chance))
        with suppress(errors.UserError):
            assert open_rgb(path).mode == "RGB", number


LAYOUTS = {"folder": ("train", "query", "gallery"), "market1501": ("bounding_box_train", "query", "bounding_box_test")}
BYTES = b"\xff\xfe".decode(errors="surrogateescape")  # a name that is no text
ODD = [
    *(".git", "._x.jpg", "__MACOSX", "@eaDir", "Thumbs.db", "lost+found", "-1", "0000", "9" * 40, "٣", "ü", BYTES),
    *("a\x1b[31mb", "c1_\x1b]0;x\x07.jpg", "a\nb_1.png", "nocamera.jpg", "_1.jpg", "0002_c1s1_000451_03.jpg"),
    *(
        "-1_c3s1_1_1.jpg",
        "0000_c1s1_1.tif",
        f"{'8' * 30}_c1.jpg",
        f"7_c{'8' * 30}.jpg",
        "٣_c٣.jpg",
        "1_c2.heic",
        "a.txt",
    ),
]


def grow(root, layout: str, chance: random.Random, kinds: list[bytes]) -> None:
    """A small data set with some oddities."""
    for split in LAYOUTS[layout]:
        for person in chance.sample("12345", chance.choice([0, 1, 2, 3])):
            for camera in "12":
                folder, name = root / split, f"000{person}_c{camera}s1_1_1.png"
                if layout == "folder":
                    folder, name = folder / f"p{person}", f"c{camera}_1.png"
                folder.mkdir(parents=True, exist_ok=True)
                content = chance.choice(kinds[:12])
                (folder / name).write_bytes(damaged(content, chance) if chance.random() < 0.1 else content)
    for _ in range(chance.choice([0, 1, 1, 2, 3])):
        folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
        path = chance.choice(folders) / chance.choice(ODD)
        if os.path.lexists(path):
            continue
        match chance.randrange(8):
            case 0 | 1 | 2:
                path.write_bytes(damaged(chance.choice(kinds), chance))
            case 3:
                path.mkdir()
                (path / chance.choice(["c1_1.png", "0007_c1s1_1_1.png", "a.gif"])).write_bytes(chance.choice(kinds))
            case 4:
                path.symlink_to(chance.choice(folders), target_is_directory=True)
            case 5:
                path.symlink_to(chance.choice(["gone", path.name]))
            case 6:
                os.mkfifo(path)
            case 7:
                shutil.rmtree(folders[-1], ignore_errors=True)
                break


@seeded(20, 2000)
def test_an_odd_folder_is_read_or_ends_in_one_line(tmp_path, numbers, capsys):
    kinds, seen = seeds(), set()
    for number in numbers:
        chance, root = random.Random(number), tmp_path / "root"
        root.mkdir()
        name = chance.choice(list(LAYOUTS))
        grow(root, name, chance, kinds)
        settings = DataConfig(name=name, root=root, skip_corrupt=chance.random() < 0.5)
        calls = [
            lambda name=name, root=root: main([name, "--root", str(root), "--sheet", str(tmp_path / "sheet.png")]),
            lambda settings=settings: read(settings, ["train"], ["query", "gallery"]),
            lambda settings=settings: read(settings, ["query", "gallery"]),
        ]
        for call in calls:
            status = 0
            try:
                errors.run(call, "program")
            except SystemExit as exit_:
                status = exit_.code
            printed = capsys.readouterr().err.replace("\r", "\n")
            assert all(char.isprintable() or char == "\n" for char in printed), number
            lines = [line for line in printed.splitlines() if line and "checking images" not in line]
            assert all(line.startswith(("program: error: ", "data.root: ", "left out ")) for line in lines), number
            assert status == (2 if "program: error: " in printed else 0), number
            seen.add(status)
        shutil.rmtree(root, ignore_errors=True)
    assert seen == {0, 2}

"""One way to open a picture: upright, RGB, or an error that names it."""

import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from cge_fast.data.images import PHOTOMETRIC, WHITE_IS_ZERO, open_rgb
from cge_fast.errors import UserError

TURNS = PIL.Image.Transpose
STORED = {  # how a camera stores a scene, by the orientation tag that it writes
    1: None,
    2: TURNS.FLIP_LEFT_RIGHT,
    3: TURNS.ROTATE_180,
    4: TURNS.FLIP_TOP_BOTTOM,
    5: TURNS.TRANSPOSE,
    6: TURNS.ROTATE_90,
    7: TURNS.TRANSVERSE,
    8: TURNS.ROTATE_270,
}
ORIENTATION = 0x0112


def opened(path):
    return np.asarray(open_rgb(path)).astype(int)


def scene():
    """Four colours, one in each quarter."""
    pixels = np.zeros((32, 16, 3), np.uint8)
    pixels[:16, :, 0], pixels[16:, :, 2], pixels[:, :8, 1] = 255, 255, 255
    return pixels


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_pictures_are_seen_as_their_orientation_says(tmp_path, kind):
    lossy = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    for tag, turn in STORED.items():
        picture, exif = PIL.Image.fromarray(scene()), PIL.Image.Exif()
        exif[ORIENTATION] = tag
        (picture if turn is None else picture.transpose(turn)).save(tmp_path / f"a.{kind}", exif=exif, **lossy)
        assert abs(opened(tmp_path / f"a.{kind}") - scene()).mean() < 3, tag


BIG_ENDIAN, LITTLE_ENDIAN = b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0"


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"no EXIF at all",
        BIG_ENDIAN + b"\xff\xff",
        LITTLE_ENDIAN[:4] + b"\xff" * 4,
        BIG_ENDIAN + b"\0\1\1\x12\0\2\0",
    ],
)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_damaged_exif_block_leaves_the_picture_readable(tmp_path, kind, block):
    PIL.Image.fromarray(scene()).save(tmp_path / f"a.{kind}", exif=b"Exif\0\0" + block)
    assert abs(opened(tmp_path / f"a.{kind}") - scene()).mean() < 10


GREY = np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (GREY.astype(np.uint16) * 257, "png"),
        (GREY.astype(np.uint16) * 257, "tif"),
        ((GREY.astype(np.uint16) * 257).astype(">u2"), "tif"),
        (GREY.astype(np.int32), "tif"),
        (GREY.astype(np.int32) * 257, "tif"),
        (GREY.astype(np.int32) * 5_000_000 - 2**29, "tif"),
        (GREY.astype(np.float32), "tif"),
        (GREY.astype(np.float32) / 255, "tif"),
        (GREY.astype(np.float32) * 257, "tif"),
        (GREY.astype(np.float32) - 300, "tif"),
        (GREY.astype(np.uint16) * 4 + 29_000, "png"),  # heat in hundredths of a kelvin: 4 of 256 greys
    ],
)
def test_greyscale_of_any_depth_keeps_its_greys(tmp_path, values, kind):
    PIL.Image.fromarray(values).save(tmp_path / f"a.{kind}")
    assert (opened(tmp_path / f"a.{kind}") == GREY[..., None]).all()


def test_deep_greyscale_without_contrast_keeps_its_brightness(tmp_path):
    PIL.Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    assert (opened(tmp_path / "a.png") == 100).all()


def test_a_dark_sixteen_bit_picture_stays_as_dark_as_in_eight_bits(tmp_path):
    PIL.Image.fromarray((GREY // 3).astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert (opened(tmp_path / "a.png") == (GREY // 3)[..., None]).all()


def test_a_greyscale_picture_with_a_hole_is_named(tmp_path):
    PIL.Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a.tif cannot be read \(a pixel is not finite\)"):
        open_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_is_black_whatever_colour_it_hides(tmp_path, mode):
    """A person cut out of the background must not get it back."""
    if mode in ("RGBA", "LA"):
        picture = PIL.Image.new(mode, (4, 4), (200,) * (len(mode) - 1) + (0,))
        picture.putpixel((0, 0), (200,) * (len(mode) - 1) + (255,))
        picture.save(tmp_path / "a.png")
    else:
        picture = PIL.Image.new(mode, (4, 4), 7 if mode != "RGB" else (7, 7, 7))
        picture.putpixel((0, 0), 200 if mode != "RGB" else (200,) * 3)
        if mode == "P":
            picture.putpalette([grey for grey in range(256) for _ in range(3)])
        picture.save(tmp_path / "a.png", transparency=7 if mode != "RGB" else (7, 7, 7))
    pixels = opened(tmp_path / "a.png")
    assert (pixels[0, 0] == 200).all()
    assert pixels.sum() == 600


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_that_is_transparent_is_black_at_any_depth(tmp_path, bits):
    """Written by hand: Pillow writes eight bits, and 16 without transparency."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    greys, most = 2 ** min(bits, 8), 2**bits - 1
    values = [grey * most // (greys - 1) for grey in range(greys)] * (8 if bits == 1 else 2 if bits == 2 else 1)
    row = int("".join(format(value, f"0{bits}b") for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    clear = chunk(b"tRNS", struct.pack(">H", values[1]))
    data = chunk(b"IHDR", header) + clear + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    wanted = [0 if value == values[1] else value * 255 // most for value in values]
    assert opened(tmp_path / "a.png")[0].tolist() == [[grey] * 3 for grey in wanted]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_zero_is_no_negative(tmp_path, bits):
    values = (255 - GREY).astype(np.uint8) if bits == 8 else (255 - GREY.astype(np.uint16)) * 257
    PIL.Image.fromarray(values).save(tmp_path / "a.tif")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    place = content.index(struct.pack("<HHI", PHOTOMETRIC, 3, 1)) + 8
    content[place] = WHITE_IS_ZERO
    (tmp_path / "a.tif").write_bytes(content)
    assert (opened(tmp_path / "a.tif") == GREY[..., None]).all()


def test_other_modes_become_rgb(tmp_path):
    for mode, kind in (("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("RGB", "bmp"), ("YCbCr", "jpg")):
        PIL.Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.{kind}")
        assert open_rgb(tmp_path / f"{mode}.{kind}").mode == "RGB"


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PPM", "TGA", "PDF", "ICO"])
def test_other_formats_are_not_opened_whatever_the_name_says(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("Ghostscript"))
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", kind)
    with pytest.raises(UserError, match=r"a.jpg cannot be read"):
        open_rgb(tmp_path / "a.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"image .*broken.jpg cannot be read"):
        open_rgb(path)


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 20_000)])
def test_an_image_that_claims_a_huge_size_is_named_before_it_is_read(tmp_path, size, monkeypatch):
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", *size)  # width and height in the header, whose checksum follows
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    monkeypatch.setattr(PIL.Image.Image, "load", lambda image: pytest.fail("it is read"))
    with pytest.raises(UserError, match=r"image .*bomb.png cannot be read \(Image size \(\d+ pixels\) exceeds"):
        open_rgb(path)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"])
def test_libtiff_and_pillow_print_nothing_of_a_damaged_picture(tmp_path, compression, capfd):
    PIL.Image.fromarray(scene()).save(tmp_path / "whole.tif", compression=compression)
    whole, refused = (tmp_path / "whole.tif").read_bytes(), 0
    for place in range(0, len(whole), 3):
        (tmp_path / "a.tif").write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        try:
            open_rgb(tmp_path / "a.tif")
        except UserError:
            refused += 1
    assert refused > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("entry", ["pipe", "folder", "gone", "missing"])
def test_what_is_no_file_is_named_and_waited_for_by_nobody(tmp_path, entry):
    path = tmp_path / "a.jpg"
    {"pipe": os.mkfifo, "folder": os.mkdir, "gone": lambda path: path.symlink_to("x"), "missing": lambda path: None}[
        entry
    ](path)
    with pytest.raises(UserError, match=r"a.jpg cannot be read \(there is no such file\)"):
        open_rgb(path)


@pytest.mark.parametrize("error", [RuntimeError("BLP"), NotImplementedError("DDS"), MemoryError(), struct.error()])
def test_whatever_pillow_raises_is_one_error(tmp_path, monkeypatch, error):
    def fails(*arguments, **keywords):
        raise error

    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "open", fails)
    with pytest.raises(UserError, match=r"a.png cannot be read"):
        open_rgb(tmp_path / "a.png")

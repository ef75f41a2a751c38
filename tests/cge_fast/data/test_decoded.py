"""Images as pixels: how they are resized and decoded, and how they are kept."""

import errno
import os
import threading
from multiprocessing import get_context

import numpy as np
import PIL.Image
import pytest
import torch

from cge_fast import files
from cge_fast.data import Image, decoded
from cge_fast.data.decoded import MANIFEST, PIXELS, Decoded
from cge_fast.data.images import open_rgb
from cge_fast.errors import UserError
from cge_fast.options import DataConfig


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("CGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "_kept", {})
    return tmp_path / "cache"


@pytest.fixture
def images(tmp_path):
    random, made = np.random.default_rng(0), []
    for number in range(5):
        path = tmp_path / f"{number}.png"
        PIL.Image.fromarray(random.integers(256, size=(11 + number, 7, 3), dtype=np.uint8)).save(path)
        made.append(Image(path, identity=number, camera=0))
    return made


def settings(**options) -> DataConfig:
    return DataConfig(**{"height": 6, "width": 4, "workers": 0} | options)


def pixels_of(images, **options) -> torch.Tensor:
    source = decoded.decoded(images, settings(**options))
    return torch.stack([source[index] for index in range(len(images))])


def test_interpolation_is_pillows_bilinear_or_bicubic(images):
    for name, method in (("bilinear", PIL.Image.Resampling.BILINEAR), ("bicubic", PIL.Image.Resampling.BICUBIC)):
        expected = np.asarray(open_rgb(images[3].path).resize((4, 6), method))
        assert np.array_equal(pixels_of(images, interpolation=name)[3], expected)


def jpeg(path, width, height, orientation=1):
    """A smooth picture, red growing to the right and green downwards, as the orientation tag says it is stored."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture, exif = PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8)), PIL.Image.Exif()
    exif[0x0112] = orientation
    if orientation == 6:
        picture = picture.transpose(PIL.Image.Transpose.ROTATE_90)
    picture.save(path, exif=exif, quality=95)
    return path


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("width", "height", "decoded_size"),
    [
        (63, 400, (63, 400)),  # a half would be less than twice the width
        (64, 95, (64, 95)),
        (64, 96, (32, 48)),
        (127, 400, (64, 200)),
        (128, 192, (32, 48)),
        (1000, 1000, (125, 125)),  # an eighth is the least
    ],
)
def test_a_large_jpeg_is_decoded_smaller_but_at_twice_its_size_at_least(
    tmp_path, width, height, decoded_size, orientation
):
    path = jpeg(tmp_path / "a.jpg", width, height, orientation)
    small, whole = open_rgb(path, (16, 24)), open_rgb(path)
    assert small.size == decoded_size
    assert whole.size == (width, height)
    sized = [np.asarray(picture.resize((16, 24))).astype(int) for picture in (small, whole)]
    assert abs(sized[0] - sized[1]).max() <= 4


def test_other_formats_are_decoded_whole(tmp_path):
    PIL.Image.new("RGB", (400, 600)).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png", (16, 24)).size == (400, 600)


@pytest.mark.parametrize("cache", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_kept_is_what_is_read_and_is_read_once(images, cache, workers, monkeypatch):
    expected, random = pixels_of(images), torch.get_rng_state()
    assert torch.equal(pixels_of(images, cache=cache, workers=workers), expected)
    assert torch.equal(torch.get_rng_state(), random), "the training's own random numbers are not disturbed"
    monkeypatch.setattr(Decoded, "__getitem__", None)
    assert torch.equal(pixels_of(images, cache=cache, workers=workers), expected)


def kept_in_another_process(images) -> list:
    return pixels_of(images, cache="disk").tolist()


def test_a_file_serves_several_processes_and_leaves_nothing_else(images, cache_home):
    with get_context("fork").Pool(2) as pool:  # which both want to write it
        ones = pool.map(kept_in_another_process, 2 * [images], chunksize=1)
    expected = pixels_of(images)
    assert ones == 2 * [expected.tolist()]
    (folder,) = cache_home.iterdir()
    assert {path.name for path in folder.iterdir()} == {PIXELS, MANIFEST, ".files"}
    assert (folder / PIXELS).stat().st_size == expected.numel()


def test_other_sizes_are_kept_beside_it(images, cache_home):
    for options in ({}, {"interpolation": "bicubic"}):
        assert torch.equal(pixels_of(images, cache="disk", **options), pixels_of(images, **options))
    assert torch.equal(pixels_of(images[:2], cache="disk"), pixels_of(images[:2]))
    assert len(list(cache_home.iterdir())) == 3


def damage(folder, images):
    content = bytearray((folder / PIXELS).read_bytes())
    content[7] ^= 1
    (folder / PIXELS).write_bytes(content)


def cut(folder, images):
    (folder / PIXELS).write_bytes((folder / PIXELS).read_bytes()[:-1])


def forget(folder, images):
    (folder / MANIFEST).unlink()


def garble(folder, images):
    (folder / MANIFEST).write_text("[]")


def change(folder, images):
    PIL.Image.new("RGB", (7, 11), "red").save(images[0].path)
    os.utime(images[0].path, ns=(1, 1))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(damage, "damaged"), (cut, "damaged"), (forget, "damaged"), (garble, "damaged"), (change, "changed since")],
)
def test_a_damaged_or_stale_file_is_made_anew_with_one_line(images, cache_home, monkeypatch, capsys, spoil, why):
    pixels_of(images, cache="disk")
    (folder,) = cache_home.iterdir()
    spoil(folder, images)
    decoded._kept.clear()
    capsys.readouterr()
    assert torch.equal(pixels_of(images, cache="disk"), pixels_of(images))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data.cache: ")]
    assert why in line
    assert str(folder) in line
    decoded._kept.clear()
    pixels_of(images, cache="disk")
    assert "anew" not in capsys.readouterr().err


def test_what_another_process_makes_anew_meanwhile_is_not_removed(images, cache_home, monkeypatch):
    pixels_of(images, cache="disk")
    (folder,) = cache_home.iterdir()
    whole = (folder / PIXELS).read_bytes()
    damage(folder, images)
    decoded._kept.clear()
    has_seen_it = threading.Event()
    monkeypatch.setattr(decoded, "notice", lambda line: has_seen_it.set())
    monkeypatch.setattr(decoded, "write", lambda folder, **of: pytest.fail("it is there"))
    with files.turn_in(cache_home):
        late = threading.Thread(target=pixels_of, args=[images], kwargs={"cache": "disk"})
        late.start()
        assert has_seen_it.wait(10)
        late.join(0.2)
        (folder / PIXELS).write_bytes(whole)
    late.join(10)
    assert (folder / PIXELS).read_bytes() == whole
    assert torch.equal(pixels_of(images, cache="disk"), pixels_of(images))


def test_too_little_memory_is_said(images, monkeypatch):
    monkeypatch.setattr(decoded, "available_memory", lambda: 100)
    with pytest.raises(UserError, match=r"data.cache: ram needs .* GB of memory for 5 images, and .* free; use disk"):
        pixels_of(images, cache="ram")


def test_a_full_disk_and_a_corrupt_image_leave_nothing(images, cache_home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(decoded.files, "write", full)
        with pytest.raises(OSError, match="No space left"):
            pixels_of(images, cache="disk")
    images[1].path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"image .*1.png cannot be read"):
        pixels_of(images, cache="disk")
    assert list(cache_home.iterdir()) == []


def full(path, content):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

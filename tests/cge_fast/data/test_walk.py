"""One folder walk: what is an image, what tools left, and what must be named."""

import os
import shutil

import PIL.Image
import pytest

from cge_fast.data.walk import image_files
from cge_fast.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two folders of two images."""
    for name in ("a/1.jpg", "a/2.png", "b/3.JPEG", "b/4.webp"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 8)).save(path)
    return tmp_path / "set"


def names(folder):
    return [str(path.relative_to(folder)) for path in image_files(folder)]


def test_images_at_any_depth_are_sorted(folder, capsys):
    (folder / "b" / "deep").mkdir()
    for name in ("5.bmp", "6.tif", "7.TIFF"):
        (folder / "b" / "deep" / name).touch()
    found = ["a/1.jpg", "a/2.png", "b/3.JPEG", "b/4.webp", "b/deep/5.bmp", "b/deep/6.tif", "b/deep/7.TIFF"]
    assert names(folder) == found
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "entry",
    [
        *(".ipynb_checkpoints/1-checkpoint.jpg", "a/._1.jpg", "__MACOSX/a/1.jpg", "a/@eaDir/1.jpg/THUMB_M.jpg"),
        *("a/.DS_Store", "a/Thumbs.db", "a/desktop.ini", "lost+found/x.jpg", "$RECYCLE.BIN/x.jpg", ".git/x.png"),
    ],
)
def test_what_tools_leave_is_no_part_of_a_set(folder, entry, capsys):
    clean = names(folder)
    (folder / entry).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "a" / "1.jpg", folder / entry)
    assert names(folder) == clean
    assert capsys.readouterr().err == ""


def test_files_of_other_formats_are_counted_in_one_line(folder, capsys):
    for name in ("x.gif", "y.heic", "z.txt"):
        (folder / "b" / name).touch()
    assert len(names(folder)) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"data.root: 4 images in {folder}; passed over: 3 of other formats, like {folder}/b/x.gif "
        "(not jpg, png, webp, bmp or tif)"
    )
    for path in (*folder.glob("a/*"), *folder.glob("b/[34]*")):
        path.unlink()
    with pytest.raises(
        UserError, match=r"holds no jpg, png, webp, bmp or tif image, but 3 of other formats, like .*gif"
    ):
        names(folder)


def test_links_to_folders_and_files_are_followed(folder, tmp_path):
    (folder / "b").rename(tmp_path / "elsewhere")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "1.jpg").rename(tmp_path / "1.jpg")
    (folder / "a" / "1.jpg").symlink_to("../../1.jpg")
    assert names(folder) == ["a/1.jpg", "a/2.png", "b/3.JPEG", "b/4.webp"]


@pytest.mark.parametrize("target", ["a", ".", "b", ".."])
def test_a_folder_that_is_reached_twice_is_named(folder, target):
    (folder / "b" / "again").symlink_to(folder / target, target_is_directory=True)
    with pytest.raises(UserError, match=r"data.root: .* is a link to a folder that .*/set holds already"):
        names(folder)


@pytest.mark.parametrize("name", ["5.jpg", "p5"])
def test_a_link_whose_target_is_gone_and_a_pipe_are_named(folder, name):
    (folder / "b" / name).symlink_to("gone")
    with pytest.raises(UserError, match=rf"data.root: .*/b/{name} is a link whose target is gone; mend or remove it"):
        names(folder)
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / "b" / name).unlink()
        put(folder / "b" / name)
        with pytest.raises(UserError, match=rf"data.root: .*/b/{name} is neither a file nor a folder; mend or remove"):
            names(folder)

"""MSMT17's archives in miniature."""

import PIL.Image
import pytest

from cge_fast.data import read
from cge_fast.data.counts import Counts, count
from cge_fast.errors import UserError
from cge_fast.options import DataConfig

LISTS = {
    "list_train.txt": [
        "0000/0000_000_01_0303morning_0015_0.jpg 0",
        "0000/0000_001_14_0303morning_0016_0.jpg 0",
        "0001/0001_000_05_0303noon_0020_1.jpg 1",
    ],
    "list_val.txt": ["0001/0001_045_15_0303afternoon_0033_2.jpg 1"],
    "list_query.txt": ["0000/0000_000_03_0113morning_0010_0.jpg 0", "0002/0002_000_04_0113morning_0010_0.jpg 2"],
    "list_gallery.txt": ["0000/0000_001_07_0113noon_0011_0.jpg 0", "0002/0002_001_04_0113noon_0012_0.jpg 2"],
}


def unpack(root, train="train", test="test"):
    """The archive with the given folders below `root`."""
    for name, lines in LISTS.items():
        folder = root / (train if name in ("list_train.txt", "list_val.txt") else test)
        for line in lines:
            path = folder / line.split()[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (4, 8)).save(path)
        (root / name).write_text("".join(f"{line}\n" for line in lines))
    return root


@pytest.fixture
def archive(tmp_path):
    return unpack(tmp_path / "MSMT17_V1")


def msmt17(root, name="msmt17"):
    return read(DataConfig(name=name, root=root))


def who(images):
    return [(image.identity, image.camera) for image in images]


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_both_versions_with_training_and_validation_lists(tmp_path, folders):
    found = msmt17(unpack(tmp_path / "MSMT17", *folders))
    assert who(found.train) == [(1, 1), (1, 14), (2, 5), (2, 15)]
    assert found.train[0].path == tmp_path / "MSMT17" / folders[0] / "0000" / "0000_000_01_0303morning_0015_0.jpg"
    assert count(found) == {"train": Counts(2, 4, 4), "query": Counts(2, 2, 2), "gallery": Counts(2, 2, 2)}


def test_the_training_list_alone(archive):
    assert who(msmt17(archive, "msmt17-train-only").train) == [(1, 1), (1, 14), (2, 5)]


def test_test_identities_are_numbered_after_the_1041_training_identities(archive):
    found = msmt17(archive)
    assert who(found.query) == [(1042, 3), (1044, 4)]
    assert who(found.gallery) == [(1042, 7), (1044, 4)]


def test_an_archive_one_level_too_deep_names_what_is_found(archive):
    with pytest.raises(UserError, match=r"there is no file .*/list_train.txt; .* holds MSMT17_V1/$"):
        msmt17(archive.parent)
    with pytest.raises(
        UserError, match=r"there is no file .*/train/list_train.txt; .*/MSMT17_V1/train holds 0000/, 0001/$"
    ):
        msmt17(archive / "train")


def test_a_folder_that_was_not_unpacked_is_named(archive):
    (archive / "test").rename(archive / "tests")
    with pytest.raises(UserError, match=r"there is no folder .*/MSMT17_V1/test; .* holds list_gallery.txt, .*tests/"):
        msmt17(archive)


def test_a_listed_image_that_is_missing_is_named(archive):
    (archive / "train" / "0001" / "0001_045_15_0303afternoon_0033_2.jpg").unlink()
    with pytest.raises(UserError, match=r"image .*0001_045_15_0303afternoon_0033_2.jpg is missing, but .*list_val.txt"):
        msmt17(archive)


@pytest.mark.parametrize(
    "line",
    ["0000/0000_000_16_0303morning_0015_0.jpg 0", "0000/0000_000_00_x.jpg 0", "0000/0000_000_01_x.jpg", "0000/x.jpg 0"],
)
def test_an_unknown_camera_and_a_line_of_another_format_are_named(archive, line):
    (archive / "list_query.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=rf"list_query.txt: the line '{line}' must be like '0000/0000_000_01_"):
        msmt17(archive)


def test_an_empty_list_is_named(archive):
    (archive / "list_gallery.txt").write_text("")
    with pytest.raises(UserError, match=r"list_gallery.txt lists no image"):
        msmt17(archive)

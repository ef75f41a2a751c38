"""VeRi-776's archive in miniature."""

import PIL.Image
import pytest

from cge_fast.data import read
from cge_fast.data.counts import Counts, count
from cge_fast.errors import UserError
from cge_fast.options import DataConfig

TRAIN = ["0001_c001_00016450_0.jpg", "0001_c020_00016460_0.jpg", "0003_c001_00016465_1.jpg"]
UNLABELLED = "0003_c007_00016470_0.jpg"
QUERY = ["0002_c002_00030600_0.jpg", "0005_c003_00030700_0.jpg"]
TEST = [*QUERY, "0002_c004_00030640_0.jpg", "0002_c004_00030645_1.jpg", "0005_c009_00030800_0.jpg"]


def write_labels(file, root, names):
    items = [
        f'    <Item imageName="{name}" vehicleID="{name[:4]}" cameraID="{name[5:9]}" colorID="1" typeID="4" />\n'
        for name in names
    ]
    text = f'<?xml version="1.0" encoding="gb2312" ?>\n<{root}>\n  <Items number="{len(names)}">\n'
    text += f"    <!-- 车辆 -->\n{''.join(items)}  </Items>\n</{root}>\n"
    file.write_bytes(text.encode("gb2312"))


@pytest.fixture
def archive(tmp_path):
    root = tmp_path / "VeRi"
    for split, names in (("train", [*TRAIN, UNLABELLED]), ("query", QUERY), ("test", TEST)):
        (root / f"image_{split}").mkdir(parents=True)
        for name in names:
            PIL.Image.new("RGB", (8, 6)).save(root / f"image_{split}" / name)
        (root / f"name_{split}.txt").write_bytes("".join(f"{name}\r\n" for name in names).encode())
    write_labels(root / "train_label.xml", "TrainingImages", TRAIN)
    write_labels(root / "test_label.xml", "TestImages", TEST)
    return root


def veri776(root):
    return read(DataConfig(name="veri776", root=root))


def replace(file, old, new):
    file.write_bytes(file.read_bytes().replace(old.encode(), new.encode()))


def test_identities_and_cameras_of_the_listed_images(archive):
    found = veri776(archive)
    assert [(image.identity, image.camera) for image in found.train] == [(1, 1), (1, 20), (3, 1), (3, 7)]
    assert [(image.identity, image.camera) for image in found.query] == [(2, 2), (5, 3)]
    assert found.gallery[2].path == archive / "image_test" / "0002_c004_00030640_0.jpg"
    assert count(found) == {"train": Counts(2, 4, 3), "query": Counts(2, 2, 2), "gallery": Counts(2, 5, 4)}


def test_an_image_that_is_not_listed_is_left_out(archive):
    replace(archive / "name_test.txt", "0002_c004_00030645_1.jpg\r\n", "")
    assert len(veri776(archive).gallery) == 4


@pytest.mark.parametrize(
    ("old", "new", "labelled"),
    [
        ('vehicleID="0003"', 'vehicleID="0004"', "vehicle 4 and camera 1"),
        ('0003" cameraID="c001"', '0003" cameraID="c011"', "vehicle 3 and camera 11"),
    ],
)
def test_a_label_against_the_name_is_named(archive, old, new, labelled):
    replace(archive / "train_label.xml", old, new)
    said = f"0003_c001_00016465_1.jpg of .*name_train.txt: its label says {labelled}, its name vehicle 3 and camera 1"
    with pytest.raises(UserError, match=said):
        veri776(archive)


@pytest.mark.parametrize("name", ["0002_c021_00030600_0.jpg", "0002_c000_00030600_0.jpg", "car.jpg"])
def test_an_unknown_camera_and_a_name_of_another_format_are_named(archive, name):
    replace(archive / "name_query.txt", QUERY[0], name)
    with pytest.raises(
        UserError, match=rf"name_query.txt: the image {name} must be named like 0001_c001_00016450_0.jpg"
    ):
        veri776(archive)


@pytest.mark.parametrize(
    ("old", "new"), [("</Items>", ""), ("vehicleID", "vehicle"), ('cameraID="c004"', 'cameraID="north"')]
)
def test_a_label_file_of_another_format_is_named(archive, old, new):
    replace(archive / "test_label.xml", old, new)
    with pytest.raises(UserError, match=r"test_label.xml: each Item must have an imageName, a vehicleID"):
        veri776(archive)


def test_a_listed_image_that_is_missing_is_named(archive):
    (archive / "image_test" / TEST[3]).unlink()
    with pytest.raises(UserError, match=rf"image .*/image_test/{TEST[3]} is missing, but .*name_test.txt lists it"):
        veri776(archive)


def test_an_archive_one_level_too_deep_names_what_is_found(archive):
    with pytest.raises(UserError, match=r"there is no file .*/train_label.xml; .* holds VeRi/$"):
        veri776(archive.parent)

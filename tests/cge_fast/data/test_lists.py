"""The archives of MSMT17, VeRi-776, VehicleID and VERI-Wild in miniature."""

from collections import Counter

import PIL.Image
import pytest

from cge_fast.data import read
from cge_fast.data.counts import Counts, count
from cge_fast.errors import UserError
from cge_fast.options import DataConfig


def write(root, lists, suffix=""):
    """Lists by their names: the folder of their images, and their lines."""
    for name, (folder, lines) in lists.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(f"{line}\r\n" for line in lines))
        for line in lines:
            path = root / folder / (line.split()[0] + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (4, 8)).save(path)
    return root


def who(images):
    return [(image.identity, image.camera) for image in images]


def read_set(name, root, *splits):
    return read(DataConfig(name=name, root=root), *splits)


MSMT17 = {
    "list_train.txt": [
        "0000/0000_000_01_0303morning_0015_0.jpg 0",
        "0000/0000_001_14_0303morning_0016_0.jpg 0",
        "0001/0001_000_05_0303noon_0020_1.jpg 1",
    ],
    "list_val.txt": ["0001/0001_045_15_0303afternoon_0033_2.jpg 1"],
    "list_query.txt": ["0000/0000_000_03_0113morning_0010_0.jpg 0", "0002/0002_000_04_0113morning_0010_0.jpg 2"],
    "list_gallery.txt": ["0000/0000_001_07_0113noon_0011_0.jpg 0", "0002/0002_001_04_0113noon_0012_0.jpg 2"],
}


def write_msmt17(root, train="train", test="test"):
    folder = {"list_train.txt": train, "list_val.txt": train, "list_query.txt": test, "list_gallery.txt": test}
    return write(root, {name: (folder[name], lines) for name, lines in MSMT17.items()})


@pytest.fixture
def msmt17(tmp_path):
    return write_msmt17(tmp_path / "MSMT17_V1")


@pytest.mark.parametrize("folders", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_both_versions_of_msmt17_with_training_and_validation_lists(tmp_path, folders):
    found = read_set("msmt17", write_msmt17(tmp_path / "MSMT17", *folders))
    assert who(found.train) == [(1, 1), (1, 14), (2, 5), (2, 15)]
    assert found.train[0].path == tmp_path / "MSMT17" / folders[0] / "0000" / "0000_000_01_0303morning_0015_0.jpg"
    assert count(found) == {"train": Counts(2, 4, 4), "query": Counts(2, 2, 2), "gallery": Counts(2, 2, 2)}


def test_msmt17s_training_list_alone(msmt17):
    assert who(read_set("msmt17-train-only", msmt17).train) == [(1, 1), (1, 14), (2, 5)]


def test_msmt17s_test_identities_are_numbered_after_the_1041_training_identities(msmt17):
    found = read_set("msmt17", msmt17)
    assert who(found.query) == [(1042, 3), (1044, 4)]
    assert who(found.gallery) == [(1042, 7), (1044, 4)]


def test_a_training_identity_beyond_the_1041_would_be_one_of_the_test(msmt17):
    (msmt17 / "list_val.txt").write_text("0001/0001_045_15_0303afternoon_0033_2.jpg 1041")
    with pytest.raises(UserError, match=r"1 people are both in training and in the test, which msmt17 separates"):
        read_set("msmt17", msmt17)


VERI776 = {
    "name_train.txt": ["0001_c001_00016450_0.jpg", "0001_c020_00016460_0.jpg", "0003_c001_00016465_1.jpg"],
    "name_query.txt": ["0002_c002_00030600_0.jpg", "0005_c003_00030700_0.jpg"],
    "name_test.txt": ["0002_c002_00030600_0.jpg", "0002_c004_00030640_0.jpg", "0005_c009_00030800_0.jpg"],
}


@pytest.fixture
def veri776(tmp_path):
    lists = {name: (name.replace("name_", "image_").removesuffix(".txt"), lines) for name, lines in VERI776.items()}
    return write(tmp_path / "VeRi", lists)


def test_veri776s_names_say_identity_and_camera(veri776):
    found = read_set("veri776", veri776)
    assert who(found.train) == [(1, 1), (1, 20), (3, 1)]
    assert who(found.query) == [(2, 2), (5, 3)]
    assert found.gallery[1].path == veri776 / "image_test" / "0002_c004_00030640_0.jpg"
    assert count(found) == {"train": Counts(2, 3, 2), "query": Counts(2, 2, 2), "gallery": Counts(2, 3, 3)}


def test_an_image_that_is_not_listed_is_left_out(veri776):
    PIL.Image.new("RGB", (4, 8)).save(veri776 / "image_test" / "0002_c004_00030645_1.jpg")
    assert len(read_set("veri776", veri776).gallery) == 3


VEHICLES = [f"{100 * vehicle + image:07d} {vehicle}" for vehicle in (7, 9, 11) for image in range(vehicle)]


@pytest.fixture
def vehicleid(tmp_path):
    lists = {"train_list.txt": ["0000001 1", "0000002 1", "0000003 2"], "test_list_800.txt": VEHICLES}
    lists |= {"test_list_1600.txt": VEHICLES[:16], "test_list_2400.txt": VEHICLES}
    lists = {f"train_test_split/{name}": ("image", lines) for name, lines in lists.items()}
    return write(tmp_path / "VehicleID_V1.0", lists, suffix=".jpg")


def test_vehicleids_gallery_is_one_image_of_each_vehicle_and_every_image_has_its_own_camera(vehicleid):
    found = read_set("vehicleid-800", vehicleid)
    assert who(found.train) == [(1, 1), (1, 2), (2, 3)]
    assert [image.identity for image in found.gallery] == [7, 9, 11]
    assert Counter(image.identity for image in found.query) == {7: 6, 9: 8, 11: 10}
    both = {image.path for image in found.query} | {image.path for image in found.gallery}
    assert len(both) == len(VEHICLES), "no image is both"
    assert found == read_set("vehicleid-800", vehicleid), "it is drawn once"
    places = [image.camera % 100 for image in found.gallery]
    assert places != [0, 0, 0], "and drawn, not the first"


def test_vehicleids_test_lists_have_800_1600_and_2400_vehicles(vehicleid):
    assert {image.identity for image in read_set("vehicleid-1600", vehicleid).query} == {7, 9}
    assert {image.identity for image in read_set("vehicleid-2400", vehicleid).query} == {7, 9, 11}


@pytest.fixture
def veri_wild(tmp_path):
    lists = {"train_list.txt": ["00001/000001", "00001/000002"], "test_3000_query.txt": ["00005/000010"]}
    lists |= {"test_3000.txt": ["00005/000011", "00006/000012"], "test_5000_query.txt": ["00006/000012"]}
    lists |= {"test_5000.txt": ["00006/000013"], "test_10000_query.txt": [], "test_10000.txt": []}
    write(tmp_path, {f"train_test_split/{name}": ("images", lines) for name, lines in lists.items()}, suffix=".jpg")
    images = {image for lines in lists.values() for image in lines}
    lines = [f"{image};{int(image[-2:]) + 100};2018-03-11 20:12:12;A;B;white" for image in sorted(images)]
    info = ["id/image;Camera ID;Time;Model;Type;Color", *lines]
    (tmp_path / "train_test_split" / "vehicle_info.txt").write_text("\n".join(info))
    return tmp_path


def test_veri_wilds_cameras_stand_in_vehicle_info(veri_wild):
    found = read_set("veri-wild-3000", veri_wild)
    assert who(found.train) == [(1, 101), (1, 102)]
    assert (who(found.query), who(found.gallery)) == ([(5, 110)], [(5, 111), (6, 112)])
    assert found.query[0].path == veri_wild / "images" / "00005" / "000010.jpg"
    assert who(read_set("veri-wild-5000", veri_wild).query) == [(6, 112)]
    with pytest.raises(UserError, match=r"test_10000_query.txt lists no image"):
        read_set("veri-wild-10000", veri_wild)


def test_an_editors_byte_order_mark_and_line_ends_are_understood(veri776):
    found = read_set("veri776", veri776)
    for file in veri776.glob("name_*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert read_set("veri776", veri776) == found


@pytest.mark.parametrize(
    ("name", "lists", "line", "like"),
    [
        ("msmt17", "list_query.txt", "0000/0000_000_16_0303morning_0015_0.jpg 0", "'0000/0000_000_01_0303morning"),
        ("msmt17", "list_query.txt", "0000/0000_000_01_x.jpg", "'0000/0000_000_01_0303morning"),
        ("msmt17", "list_query.txt", f"0000/0000_000_01_x.jpg {'9' * 5000}", "'0000/0000_000_01_0303morning"),
        ("msmt17", "list_query.txt", "../../0000_000_01_x.jpg 0", "name a file below"),
        ("msmt17", "list_query.txt", "/etc/0000_000_01_x.jpg 0", "name a file below"),
        ("veri776", "name_query.txt", "0002_c021_00030600_0.jpg", "'0001_c001_00016450_0.jpg'"),
        ("veri776", "name_query.txt", "car.jpg", "'0001_c001_00016450_0.jpg'"),
        ("veri776", "name_query.txt", "0002_c002_/../../../x.jpg", "name a file below"),
        ("vehicleid-800", "train_test_split/test_list_800.txt", "../0116480 11", "'0116480 11'"),
        ("vehicleid-800", "train_test_split/test_list_800.txt", f"{'1' * 19} 11", "'0116480 11'"),
        ("veri-wild-3000", "train_test_split/test_3000.txt", "00005/999999", "stand in vehicle_info.txt"),
    ],
)
def test_a_line_that_says_something_else_is_named(request, name, lists, line, like):
    root = request.getfixturevalue(name.replace("veri-wild", "veri_wild").partition("-")[0])
    (root / lists).write_text(f"{line}\n")
    with pytest.raises(UserError) as error:
        read_set(name, root, ["query", "gallery"])
    assert f"{(root / lists).name}: the line '{line}' must " in str(error.value)
    assert like in str(error.value)


def test_an_archive_one_level_too_deep_names_what_is_found(msmt17):
    with pytest.raises(UserError, match=r"there is no file .*/list_train.txt; .* holds MSMT17_V1/$"):
        read_set("msmt17", msmt17.parent)
    with pytest.raises(
        UserError, match=r"there is no file .*/train/list_train.txt; .*/MSMT17_V1/train holds 0000/, 0001/$"
    ):
        read_set("msmt17", msmt17 / "train")


def test_a_folder_that_was_not_unpacked_is_named(msmt17):
    (msmt17 / "test").rename(msmt17 / "tests")
    with pytest.raises(UserError, match=r"there is no folder .*/MSMT17_V1/test; .* holds list_gallery.txt, .*tests/"):
        read_set("msmt17", msmt17)


def test_a_listed_image_that_is_missing_is_named(msmt17):
    (msmt17 / "train" / "0001" / "0001_045_15_0303afternoon_0033_2.jpg").unlink()
    with pytest.raises(UserError, match=r"image .*0001_045_15_0303afternoon_0033_2.jpg is missing, but .*list_val.txt"):
        read_set("msmt17", msmt17)


def test_an_empty_list_is_named(msmt17):
    (msmt17 / "list_gallery.txt").write_text("")
    with pytest.raises(UserError, match=r"list_gallery.txt lists no image"):
        read_set("msmt17", msmt17)


def test_each_split_is_read_alone(msmt17):
    (msmt17 / "list_train.txt").unlink()
    assert len(read_set("msmt17", msmt17, ["query", "gallery"]).gallery) == 2
    with pytest.raises(UserError, match="there is no file"):
        read_set("msmt17", msmt17, ["train"], ["query", "gallery"])

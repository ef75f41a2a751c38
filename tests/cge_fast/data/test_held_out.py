"""What is held out where there are only images to train on."""

import hashlib

import PIL.Image
import pytest

from cge_fast.data import read
from cge_fast.data.batches import train_labels
from cge_fast.data.images import names as image_names
from cge_fast.errors import UserError
from cge_fast.options import DataConfig


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 8)).save(path)


def who(images):
    return sorted((image.identity, image.camera) for image in images)


CAMERAS = {"anna": "ns", "bert": "nss", "carl": "n", "dora": "nsw", "emil": "nnss", "fritz": "ww", "gerd": "sw"}


@pytest.fixture
def only_train(tmp_path):
    """Five identities of several cameras and two of one, beside a distractor."""
    for identity, cameras in CAMERAS.items():
        for number, camera in enumerate(cameras):
            touch(tmp_path / "own" / "train" / identity / f"{camera}_{number}.jpg")
    touch(tmp_path / "own" / "train" / "0000" / "0000_c1s1_000451_03.jpg")
    return tmp_path / "own"


def own(root, *splits, held_out=0.4, name="folder"):
    return read(DataConfig(name=name, root=root, held_out=held_out), *splits)


def names(images):
    return sorted({image.identity_name for image in images})


def test_identities_of_several_cameras_are_held_out_where_there_is_only_train(only_train, capsys):
    found = own(only_train, ["train"], ["query", "gallery"])
    held_out = names(found.gallery)
    assert len(held_out) == 2
    assert not {*held_out} & {"carl", "fritz", ""}
    assert names(found.train) == sorted({*CAMERAS, ""} - {*held_out})
    assert len(found.train) + len(found.gallery) == sum(map(len, CAMERAS.values())) + 1
    for identity in held_out:
        queries = [image.camera_name for image in found.query if image.identity_name == identity]
        assert queries == sorted({*CAMERAS[identity]}), "one of each camera"
    assert {*found.query} <= {*found.gallery}
    images = len(found.gallery)
    line = f"has images to train on alone; 2 of its 7 identities ({images} of 18 images) are held out as query and"
    assert line in capsys.readouterr().err


def test_evaluation_and_training_hold_out_the_same_and_a_set_that_grows_most_of_them(only_train):
    found, again = own(only_train, ["train"], ["query", "gallery"]), own(only_train, ["query", "gallery"])
    assert (found.query, found.gallery) == (again.query, again.gallery)
    for camera in "ns":
        touch(only_train / "train" / "aaron" / f"{camera}_1.jpg")
    grown = names(own(only_train).gallery)
    assert len({*grown} - {*names(found.gallery)}) <= 1
    assert names(own(only_train, ["query", "gallery"], held_out=1.0).gallery) == sorted(
        {*CAMERAS, "aaron"} - {"carl", "fritz"}
    )


def test_those_are_held_out_whose_names_have_the_least_sha256(only_train):
    several = [identity for identity, cameras in CAMERAS.items() if len({*cameras}) > 1]
    by_digest = sorted(several, key=lambda identity: hashlib.sha256(identity.encode()).digest())
    assert by_digest != sorted(several)
    for share, count in ((0.01, 1), (0.4, 2), (0.8, 4)):
        assert names(own(only_train, held_out=share).gallery) == sorted(by_digest[:count])


def test_nothing_is_held_out_unasked_or_beside_query_and_gallery(only_train, shared_market):
    assert read(DataConfig(name="folder", root=only_train), ["train"], ["query", "gallery"]).gallery == []
    for name in ("market1501", "market"):
        assert own(shared_market, name=name) == read(DataConfig(name=name, root=shared_market))
    touch(only_train / "query" / "hans" / "n_1.jpg")
    assert len(own(only_train, ["train"], ["query", "gallery"]).train) == 18
    with pytest.raises(UserError, match=r"there is no folder .*gallery"):
        own(only_train)


def test_a_corrupt_image_that_is_query_and_gallery_is_counted_once(only_train, capsys):
    for path in (only_train / "train").glob("*/n_0.jpg"):
        path.write_bytes(b"")
    found = read(DataConfig(name="folder", root=only_train, held_out=1.0, skip_corrupt=True), ["query", "gallery"])
    assert len(found.gallery) == 10
    assert "left out 4 corrupt images" in capsys.readouterr().err


def test_market1501s_format_holds_out_by_number(tmp_path):
    for name in ("0002_c1s1_1", "0007_c12s3_1", "0007_c1s3_1", "0000_c1s3_1", "0000_c2s3_1", "-1_c1s1_1"):
        touch(tmp_path / "bounding_box_train" / f"{name}.jpg")
    found = own(tmp_path, name="market")
    assert who(found.query) == who(found.gallery) == [(7, 1), (7, 12)]
    assert who(found.train) == [(0, 1), (0, 2), (2, 1)]
    with pytest.raises(UserError, match="there is no folder"):
        own(tmp_path / "bounding_box_train", name="market")


def test_identities_of_one_camera_cannot_be_held_out(tmp_path):
    touch(tmp_path / "train" / "anna" / "north_1.jpg")
    assert len(own(tmp_path, ["train"], ["query", "gallery"]).train) == 1
    with pytest.raises(UserError, match=r"data.held_out: 0.4 of 0 identities of several cameras leaves no query"):
        own(tmp_path)
    touch(tmp_path / "train" / "anna" / "south_1.jpg")
    with pytest.raises(UserError, match=r"data.held_out: 0.4 of 1 identities of several cameras leaves no train"):
        own(tmp_path)


def test_a_set_of_names_keeps_them_in_the_order_of_the_labels(only_train, shared_market):
    images = read(DataConfig(name="folder", root=only_train), ["train"]).train
    found = image_names(images)
    labels = train_labels(images)
    assert [found["identities"][label] for label in labels] == [image.identity_name for image in images]
    assert found["cameras"] == ["1", "n", "s", "w"]
    images = read(DataConfig(name="market1501", root=shared_market)).train
    assert image_names(images) == {}
    assert [image.labels for image in images] == [(image.identity, image.camera) for image in images]

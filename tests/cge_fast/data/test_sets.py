"""Readers: what they find, and what they say when they do not."""

from typing import get_args, get_type_hints

import PIL.Image
import pytest

from cge_fast.data import read
from cge_fast.data.sets import SETS, pedestrians
from cge_fast.errors import UserError
from cge_fast.options import DataConfig


def touch(path, size=(4, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size).save(path)


@pytest.fixture
def market(tmp_path):
    for name in ("0002_c1s1_000451_03.jpg", "0007_c12s3_000001_00.png"):
        touch(tmp_path / "bounding_box_train" / name)
    touch(tmp_path / "query" / "0009_c2s1_000001_00.jpg")
    for name in ("-1_c3s1_000001_00.jpg", "0000_c3s1_000002_00.jpg", "0009_c3s1_000003_00.jpg"):
        touch(tmp_path / "bounding_box_test" / name)
    return tmp_path


def market1501(root, **options):
    return read(DataConfig(name="market1501", root=root, **options))


def who(images):
    return sorted((image.identity, image.camera) for image in images)


def test_market1501_names_say_identity_and_camera(market):
    found = market1501(market)
    assert who(found.train) == [(2, 1), (7, 12)]
    assert who(found.query) == [(9, 2)]


def test_market1501_drops_junk_and_keeps_distractors_in_the_gallery(market):
    assert who(market1501(market).gallery) == [(0, 3), (9, 3)]


def test_market1501_ignores_other_files(market):
    (market / "query" / "Thumbs.db").write_bytes(b"x")
    assert len(market1501(market).query) == 1


def test_market1501_names_what_is_missing_or_wrong(market, tmp_path):
    with pytest.raises(UserError, match=r"data.root: there is no folder .*/nix/bounding_box_train"):
        market1501(tmp_path / "nix")
    touch(market / "query" / "somebody.jpg")
    with pytest.raises(UserError, match=r"image .*somebody.jpg must be named like 0002_c1s1_000451_03.jpg"):
        market1501(market)
    for path in (market / "query").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"/query holds no jpg or png image"):
        market1501(market)
    touch(market / "query" / "-1_c1s1_000001_00.jpg")
    with pytest.raises(UserError, match=r"/query holds only junk images"):
        market1501(market)


def test_a_root_above_or_below_the_right_folder_is_told_what_is_there(market, tmp_path):
    unpacked = market / "Market-1501-v15.09.15"
    unpacked.mkdir()
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        (market / split).rename(unpacked / split)
    with pytest.raises(
        UserError, match=rf"there is no folder .*/bounding_box_train; {market} holds Market-1501-v15.09.15/$"
    ):
        market1501(market)
    for number in range(1, 10):
        touch(unpacked / "query" / f"0009_c2s1_000001_0{number}.jpg")
    with pytest.raises(UserError, match=r"query holds 0009_c2s1_000001_00.jpg, .*, 0009_c2s1_000001_05.jpg, 4 more$"):
        market1501(unpacked / "query")
    (unpacked / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*; .*/empty holds nothing$"):
        market1501(unpacked / "empty")


def test_every_set_with_a_reader_can_be_chosen():
    chosen = get_args(get_type_hints(DataConfig)["name"])
    assert {*SETS, "pedestrians", "pedestrians-trap"} == set(chosen)


def test_a_set_without_a_root_asks_for_it():
    with pytest.raises(UserError, match=r"data.root: the data set folder needs the folder where it lies"):
        read(DataConfig(name="folder"))


def test_a_folder_of_crops_names_identities_and_cameras_as_it_likes(tmp_path):
    touch(tmp_path / "train" / "anna" / "north_1.jpg")
    touch(tmp_path / "train" / "bert" / "south_b_2.png")
    touch(tmp_path / "query" / "carl" / "north_x.jpg")
    touch(tmp_path / "gallery" / "carl" / "south_y.JPG")
    found = read(DataConfig(name="folder", root=tmp_path))
    (query,), (gallery,) = found.query, found.gallery
    assert query.identity == gallery.identity
    assert query.camera != gallery.camera
    assert len({image.identity for image in found.train}) == 2
    by_name = {image.path.name: image.camera for image in found.train}
    assert by_name == {"north_1.jpg": query.camera, "south_b_2.png": gallery.camera}


@pytest.mark.parametrize("wrong", ["stray_1.jpg", "anna/nocamera.jpg", "anna/deep/north_1.jpg", "anna/_1.jpg"])
def test_a_misplaced_crop_is_named(tmp_path, wrong):
    for split in ("train", "query", "gallery"):
        touch(tmp_path / split / "anna" / "north_1.jpg")
    touch(tmp_path / "query" / wrong)
    with pytest.raises(UserError, match=r"must lie at .*/query/<identity>/<camera>_<anything>.jpg"):
        read(DataConfig(name="folder", root=tmp_path))


def test_a_split_whose_images_are_all_corrupt_is_named(market):
    for path in (market / "query").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="the query split of market1501 holds no readable image"):
        market1501(market, skip_corrupt=True)


def test_a_gallery_without_any_match_is_refused_before_training(market):
    (market / "bounding_box_test" / "0009_c3s1_000003_00.jpg").unlink()
    touch(market / "bounding_box_test" / "0009_c2s1_000003_00.jpg")
    with pytest.raises(UserError, match="no query's identity from another camera"):
        market1501(market)


def test_the_embedded_set_is_drawn_once_into_the_cache(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setenv("CGE_CACHE", str(tmp_path))
    monkeypatch.setattr("cge_fast.data.sets.draw", lambda folder, **how: (drawn.append(how), folder.mkdir()))
    folders = {pedestrians(), pedestrians(), pedestrians(trap=True), pedestrians(seed=1), pedestrians(trap=True)}
    assert len(folders) == 3
    assert drawn == [{"trap": False, "seed": 0}, {"trap": True, "seed": 0}, {"trap": False, "seed": 1}]

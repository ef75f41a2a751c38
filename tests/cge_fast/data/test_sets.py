"""Readers: what they find, and what they say when they do not."""

import re
import shutil
from pathlib import Path
from typing import get_args

import PIL.Image
import pytest
from conftest import write_market1501

from cge_fast.data import read
from cge_fast.data.pedestrians import draw
from cge_fast.data.sets import SETS, each_set, pedestrians
from cge_fast.errors import UserError
from cge_fast.options import DataConfig, DataSet


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
    with pytest.raises(UserError, match=r"/query holds no jpg, png, webp, bmp or tif image"):
        market1501(market)
    touch(market / "query" / "-1_c1s1_000001_00.jpg")
    with pytest.raises(UserError, match=r"/query holds only junk images"):
        market1501(market)


@pytest.mark.parametrize("name", [f"{'9' * 19}_c1s1.jpg", f"1_c{'9' * 19}s1.jpg", "-2_c1s1.jpg", "٣_c1s1.jpg"])
def test_numbers_beyond_64_bits_and_of_other_scripts_are_named(market, name):
    touch(market / "query" / name)
    with pytest.raises(UserError, match=r"must be named like 0002_c1s1_000451_03.jpg"):
        market1501(market)


def test_market1501s_folders_may_lie_one_level_below_the_root(market):
    clean = market1501(market)
    unpacked = market / "Market-1501-v15.09.15"
    unpacked.mkdir()
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        (market / split).rename(unpacked / split)
    (market / "__MACOSX" / "query").mkdir(parents=True)
    assert [who(part) for part in vars(market1501(market)).values()] == [who(part) for part in vars(clean).values()]
    (market / "another" / "query").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"no folder .*/bounding_box_train; {market} holds Market-1501-v15.09.15/"):
        market1501(market)


def test_a_root_below_the_right_folder_is_told_what_is_there(market):
    for number in range(1, 10):
        touch(market / "query" / f"0009_c2s1_000001_0{number}.jpg")
    with pytest.raises(UserError, match=r"query holds 0009_c2s1_000001_00.jpg, .*, 0009_c2s1_000001_05.jpg, 4 more$"):
        market1501(market / "query")
    (market / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no folder .*; .*/empty holds nothing$"):
        market1501(market / "empty")


def test_duke_and_occluded_duke_are_of_market1501s_format(market):
    for name in ("dukemtmc", "occluded-duke"):
        assert who(read(DataConfig(name=name, root=market)).train) == [(2, 1), (7, 12)]


def test_every_set_with_a_reader_can_be_chosen():
    chosen = get_args(DataSet)
    assert {*SETS, "pedestrians", "pedestrians-trap"} == set(chosen)


def test_a_set_without_a_root_asks_for_it():
    with pytest.raises(UserError, match=r"data.root: the data set folder needs the folder where it lies"):
        read(DataConfig(name="folder"))


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        ("folder", "A+B", [("folder", "A+B")]),
        ("msmt17+folder", "A+B", [("msmt17", "A"), ("folder", "B")]),
        ("vehicleid-800+vehicleid-1600", "A", [("vehicleid-800", "A"), ("vehicleid-1600", "A")]),
        ("msmt17+folder", "A+~/B", [("msmt17", "A"), ("folder", str(Path.home() / "B"))]),
        ("pedestrians+folder", "A", [("pedestrians", None), ("folder", "A")]),
        ("pedestrians+folder", "+A", [("pedestrians", None), ("folder", "A")]),
        ("pedestrians+pedestrians-trap", None, [("pedestrians", None), ("pedestrians-trap", None)]),
        ("folder+market1501", None, [("folder", None), ("market1501", None)]),
    ],
)
def test_several_sets_have_settings_of_their_own(name, root, expected):
    settings = DataConfig(name=name, root=root and Path(root), height=7)
    found = each_set(settings)
    assert [(one.name, one.root and str(one.root)) for one in found] == expected
    assert {one.height for one in found} == {7}


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("folder+nix", "A", "data.name: there is no data set nix, but pedestrians, "),
        ("folder+market1501", "A+B+C", "data.root: must be one folder for all, or 2 like A+B, got 3"),
    ],
)
def test_several_sets_that_do_not_fit_their_roots_are_named(name, root, message):
    for taken in (each_set, read):
        with pytest.raises(UserError, match=re.escape(message)):
            taken(DataConfig(name=name, root=Path(root)))


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


def test_market1501s_names_in_folders_of_identities_say_the_camera(tmp_path):
    names = {"train/0002": ["0002_c1s1_000451_03.jpg", "0002_c1s2_000776_01.jpg", "0002_c4s1_000001_01.jpg"]}
    names |= {"query/9": ["0009_c1s1_000001_01.jpg"], "gallery/9": ["0009_c04s1_000001_01.jpg"]}
    names |= {"gallery/-1": ["-1_c1s1_1_1.jpg"], "gallery/0000": ["0000_c2s1_000001_01.jpg"]}
    for folder, files in names.items():
        for name in files:
            touch(tmp_path / folder / name)
    found = read(DataConfig(name="folder", root=tmp_path))
    assert [image.camera for image in found.train] == [1, 1, 4]
    (query,) = found.query
    assert sorted((image.identity, image.camera) for image in found.gallery) == [(0, 2), (query.identity, 4)]


def test_cameras_that_are_numbers_keep_them(tmp_path):
    def cameras():
        found = read(DataConfig(name="folder", root=tmp_path))
        return [image.camera for part in vars(found).values() for image in part]

    for name in ("train/a/07_1.jpg", "query/b/12_1.jpg", "gallery/b/7_1.jpg"):
        touch(tmp_path / name)
    assert sorted(cameras()) == [0, 1, 2], "07 and 7 are two names"
    (tmp_path / "train" / "a" / "07_1.jpg").rename(tmp_path / "train" / "a" / "12_1.jpg")
    assert cameras() == [12, 12, 7]


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


def test_corrupt_images_are_counted_and_the_first_are_named(market, capsys):
    for number in range(8):
        (market / "bounding_box_train" / f"0001_c1s1_{number}.jpg").write_bytes(b"")
    assert len(market1501(market, skip_corrupt=True).train) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("left out 8 corrupt images: ")
    assert line.count(".jpg") == 6
    assert line.endswith(", 2 more")


def test_a_gallery_without_any_match_is_refused_where_it_is_needed(market):
    (market / "bounding_box_test" / "0009_c3s1_000003_00.jpg").unlink()
    touch(market / "bounding_box_test" / "0009_c2s1_000003_00.jpg")
    with pytest.raises(UserError, match=r"no query's identity from another camera.*its camera: <camera>_<anything>"):
        market1501(market)
    settings = DataConfig(name="market1501", root=market)
    assert len(read(settings, ["train"], ["query", "gallery"]).gallery) == 2


def test_only_the_splits_that_are_needed_must_be_there(market):
    settings = DataConfig(name="market1501", root=market)
    shutil.rmtree(market / "bounding_box_train")
    found = read(settings, ["query", "gallery"])
    assert (len(found.train), len(found.query), len(found.gallery)) == (0, 1, 2)
    with pytest.raises(UserError, match=r"there is no folder .*bounding_box_train"):
        read(settings, ["train"], ["query", "gallery"])
    touch(market / "bounding_box_train" / "0002_c1s1_000451_03.jpg")
    shutil.rmtree(market / "query")
    assert len(read(settings, ["train"], ["query", "gallery"]).gallery) == 2
    assert read(settings, ["train"]).gallery == [], "what is not asked for is not read"
    with pytest.raises(UserError, match=r"there is no folder .*query"):
        read(settings, ["query", "gallery"])


def test_people_in_training_and_test_are_counted_and_refused_in_a_published_set(market, tmp_path, capsys):
    touch(market / "bounding_box_train" / "0009_c1s1_000451_03.jpg")
    with pytest.raises(UserError, match=r"1 people are both in training and in the test, which market1501 separates"):
        market1501(market)
    for path in ("train/anna/north_1", "train/bert/north_1", "query/anna/north_2", "gallery/anna/south_1"):
        touch(tmp_path / "crops" / f"{path}.jpg")
    read(DataConfig(name="folder", root=tmp_path / "crops"))
    said = "data.root: 1 people are both in training and in the test: the figures of the evaluation will be too good"
    assert capsys.readouterr().err.splitlines() == [said]


def test_market1501s_format_without_published_counts_may_mix_people_up(market, capsys):
    touch(market / "bounding_box_train" / "0009_c1s1_000451_03.jpg")
    assert who(read(DataConfig(name="market", root=market)).query) == [(9, 2)]
    assert "1 people are both in training and in the test" in capsys.readouterr().err


def test_distractors_are_nobody(market):
    touch(market / "bounding_box_train" / "0000_c1s1_000451_03.jpg")
    market1501(market)


def test_the_embedded_set_is_drawn_once_into_the_cache(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setenv("CGE_CACHE", str(tmp_path))
    monkeypatch.setattr("cge_fast.data.sets.draw", lambda folder, **how: (drawn.append(how), folder.mkdir()))
    folders = {pedestrians(), pedestrians(), pedestrians(trap=True), pedestrians(seed=1), pedestrians(trap=True)}
    assert len(folders) == 3
    assert drawn == [{"trap": False, "seed": 0}, {"trap": True, "seed": 0}, {"trap": False, "seed": 1}]


def test_a_cache_that_lost_images_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CGE_CACHE", str(tmp_path))
    few = {"train_identities": 2, "test_identities": 2, "images_per_identity": 6}
    monkeypatch.setattr("cge_fast.data.sets.draw", lambda folder, **how: draw(folder, **how, **few))
    lost = next((pedestrians() / "bounding_box_train").iterdir())
    assert len(read(DataConfig()).train) == 12
    lost.unlink()
    with pytest.raises(UserError, match=r"pedestrians-1 holds 23 of its 24 files: remove it, and it is made anew"):
        read(DataConfig())


def test_several_sets_are_trained_on_as_different_people_and_the_first_is_evaluated(tmp_path):
    for name in ("market1501", "dukemtmc"):
        write_market1501(tmp_path / name)
    alone, both = (
        read(DataConfig(name=name, root=root))
        for name, root in (
            ("market1501", tmp_path / "market1501"),
            ("market1501+dukemtmc", Path(f"{tmp_path / 'market1501'}+{tmp_path / 'dukemtmc'}")),
        )
    )
    assert (both.query, both.gallery) == (alone.query, alone.gallery)
    assert both.train[: len(alone.train)] == alone.train
    added = both.train[len(alone.train) :]
    assert [image.path.name for image in added] == [image.path.name for image in alone.train]
    assert {image.path.parents[1].name for image in added} == {"dukemtmc"}
    every = alone.train + alone.query + alone.gallery
    for key in ("identity", "camera"):
        assert not {getattr(image, key) for image in added} & {getattr(image, key) for image in every}
        kinds = {(getattr(old, key), getattr(new, key)) for old, new in zip(alone.train, added, strict=True)}
        assert len(kinds) == len({getattr(image, key) for image in alone.train}), "one for one"
    assert read(DataConfig(name="market1501+dukemtmc", root=tmp_path / "market1501"), ["query"]).train == []


def test_a_set_of_several_that_cannot_be_read_or_comes_twice_is_named(tmp_path):
    write_market1501(tmp_path)
    with pytest.raises(UserError, match=r"data\.name: each set can be there once, got market1501\+market1501"):
        read(DataConfig(name="market1501+market1501", root=tmp_path))
    with pytest.raises(UserError, match=r"there is no file .*list_train\.txt"):
        read(DataConfig(name="market1501+msmt17", root=tmp_path))

"""python -m cge_fast.data"""

import PIL.Image
import pytest

from cge_fast import errors
from cge_fast.data import pedestrians, read
from cge_fast.data.__main__ import main
from cge_fast.data.counts import Counts
from cge_fast.data.market1501 import read_market1501
from cge_fast.data.sets import SETS
from cge_fast.options import DataConfig


@pytest.fixture
def omniglot(tmp_path):
    """The public archives' layout in miniature: two alphabets each, 20 drawers."""
    number = 0
    for archive, alphabets in (
        ("images_background_small1", ("Greek", "Korean")),
        ("images_background_small2", ("Latin",)),
    ):
        for alphabet in alphabets:
            for character in ("character01", "character02"):
                number += 1
                folder = tmp_path / "archives" / archive / alphabet / character
                folder.mkdir(parents=True)
                for drawer in range(1, 21):
                    PIL.Image.new("1", (105, 105), drawer % 2).save(folder / f"{number:04d}_{drawer:02d}.png")
    return tmp_path / "archives"


def test_omniglot_characters_become_identities_and_drawers_cameras(omniglot, tmp_path, capsys):
    main(["omniglot", "--source", str(omniglot), "--export", str(tmp_path / "set")])
    assert (tmp_path / "set" / "contact_sheet.png").exists()
    found = read(DataConfig(name="market1501", root=tmp_path / "set"))
    assert {image.identity for image in found.train} == {1, 2, 3, 4}
    assert len(found.train) == 80
    assert {image.identity for image in found.query} == {5, 6}
    assert sorted(image.camera for image in found.query) == [2, 2, 3, 3, 4, 4, 5, 5]
    assert len(found.gallery) == 32
    names = {image.path.name for image in found.gallery}
    assert {"0005_c6s1_000005_01.jpg", "0006_c3s1_000020_01.jpg"} <= names
    picture = PIL.Image.open(found.train[0].path)
    assert (picture.size, picture.mode) == ((64, 64), "RGB")
    assert picture.getpixel((30, 30)) == (0, 0, 0), "first by name is camera 1's drawer 6, an even one, drawn black"


def test_a_broken_drawing_leaves_nothing_behind(omniglot, tmp_path):
    broken = omniglot / "images_background_small2" / "Latin" / "character01" / "0005_03.png"
    broken.write_bytes(b"")
    with pytest.raises(errors.UserError, match=r"0005_03.png cannot be read"):
        main(["omniglot", "--source", str(omniglot), "--export", str(tmp_path / "set")])
    assert [path.name for path in tmp_path.iterdir()] == ["archives"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["omniglot", "--source", "/nix", "--export", "x"], "source: there is no folder /nix/images_background_small1"),
        (["pedestrians"], "pedestrians.export"),
        (["veri776"], "veri776.root"),
        (["msmt17", "--root", "/nix"], "data.root: there is no file /nix/list_train.txt; / holds "),
        (["elephants", "--export", "x"], "elephants"),
        (["market1501", "--rot", "x"], "error: there is no --rot\n"),
    ],
)
def test_wrong_calls_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: main(arguments), "cge_fast.data")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_folder_that_is_not_empty_is_left_alone(omniglot, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("x")
    for arguments in (["omniglot", "--source", str(omniglot)], ["pedestrians"]):
        with pytest.raises(errors.UserError, match=r"/set exists already and is not an empty folder"):
            main([*arguments, "--export", str(tmp_path / "set")])
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine.txt"]


def test_the_embedded_set_is_written_with_a_contact_sheet(tmp_path, monkeypatch, capsys):
    draw = pedestrians.draw
    few = {"train_identities": 6, "test_identities": 6, "images_per_identity": 6}
    monkeypatch.setattr("cge_fast.data.__main__.draw", lambda folder, trap: draw(folder, trap, **few))
    main(["pedestrians", "--export", str(tmp_path / "set")])
    assert "contact_sheet.png" in capsys.readouterr().out
    assert len(read(DataConfig(name="market1501", root=tmp_path / "set")).train) == 36


def test_counts_that_are_not_the_published_ones_fail_after_table_and_sheet(market, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        errors.run(
            lambda: main(["market1501", "--root", str(market), "--sheet", str(tmp_path / "sheet.png")]), "cge_fast.data"
        )
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()] == [
        ["found", "identities", "images", "cameras", "published", "identities", "images", "cameras"],
        ["train", "4", "24", "3", "751", "12,936", "6"],
        ["query", "4", "4", "1", "750", "3,368", "6"],
        ["gallery", "4", "20", "3", "751", "15,913", "6"],
        ["a", "look", "at", "it:", str(tmp_path / "sheet.png")],
    ]
    assert len({len(line) for line in printed.out.splitlines()[:4]}) == 1, "the columns stand below one another"
    (error,) = printed.err.splitlines()
    assert "data.root: these are not the published counts: train identities 4, not 751; train images 24, not" in error
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 72


# Zheng et al. 2015 (without the junk), Wei et al. 2018, Zhong et al. 2017 (new protocol), Li et al. 2014, Liu et al.
# 2016, Zheng et al. 2017, Miao et al. 2019; VehicleID and VERI-Wild by their lists, as FastReID's readers count them
@pytest.mark.parametrize(
    ("name", "train", "query", "gallery"),
    [
        ("market1501", (751, 12936, 6), (750, 3368, 6), (751, 15913, 6)),
        ("msmt17", (1041, 32621, 15), (3060, 11659, 15), (3060, 82161, 15)),
        ("msmt17-train-only", (1041, 30248, 15), (3060, 11659, 15), (3060, 82161, 15)),
        ("cuhk03-detected", (767, 7365, 2), (700, 1400, 2), (700, 5332, 2)),
        ("cuhk03-labeled", (767, 7368, 2), (700, 1400, 2), (700, 5328, 2)),
        ("cuhk03-labeled-classic", (1367, None, 2), (100, None, 1), (100, 100, 1)),
        ("veri776", (576, 37778, 20), (200, 1678, 19), (200, 11579, 19)),
        ("dukemtmc", (702, 16522, 8), (702, 2228, 8), (1110, 17661, 8)),
        ("occluded-duke", (702, 15618, 8), (519, 2210, 8), (1110, 17661, 8)),
        ("vehicleid-800", (13164, 113346, None), (800, 5693, None), (800, 800, None)),
        ("vehicleid-2400", (13164, 113346, None), (2400, 17377, None), (2400, 2400, None)),
        ("veri-wild-3000", (30671, 277797, None), (3000, 3000, None), (3000, 38861, None)),
        ("veri-wild-10000", (30671, 277797, None), (10000, 10000, None), (10000, 128517, None)),
    ],
)
def test_the_published_counts(name, train, query, gallery):
    _, published = SETS[name]
    assert published == {"train": train, "query": query, "gallery": gallery}


def test_a_single_count_that_differs_is_the_one_named(market, tmp_path, monkeypatch, capsys):
    published = {"train": Counts(4, 24, 3), "query": Counts(4, 4, 1), "gallery": Counts(4, 20, 3)}
    arguments = ["market1501", "--root", str(market), "--sheet", str(tmp_path / "sheet.png")]
    monkeypatch.setitem(SETS, "market1501", (read_market1501, published))
    main(arguments)
    monkeypatch.setitem(SETS, "market1501", (read_market1501, published | {"query": Counts(4, 4, None)}))
    main(arguments)  # None was not published
    assert capsys.readouterr().out.splitlines()[-3].endswith("-")
    monkeypatch.setitem(SETS, "market1501", (read_market1501, published | {"query": Counts(4, 4, 6)}))
    with pytest.raises(errors.UserError, match=r"not the published counts: query cameras 1, not 6$"):
        main(arguments)


def test_a_set_of_which_nothing_was_published_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, camera in (("train", "north"), ("query", "north"), ("gallery", "south")):
        folder = tmp_path / "crops" / split / "anna"
        folder.mkdir(parents=True)
        PIL.Image.new("RGB", (4, 8)).save(folder / f"{camera}_1.png")
    main(["folder", "--root", "crops"])
    printed = capsys.readouterr().out
    assert "published" not in printed
    assert ["gallery", "1", "1", "1"] in [line.split() for line in printed.splitlines()]
    with PIL.Image.open(tmp_path / "folder_contact_sheet.png") as sheet:
        assert sheet.size == (72 + 2 * 64, 2 * 126), "anna is no distractor: a row of each split"


def test_a_set_without_a_split_is_shown_and_images_of_any_shape_fit(tmp_path, capsys):
    for name, size in (("c1_1.png", (1, 2000)), ("c2_1.bmp", (2000, 1))):
        (tmp_path / "crops" / "train" / "anna").mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", size).save(tmp_path / "crops" / "train" / "anna" / name)
    main(["folder", "--root", str(tmp_path / "crops"), "--sheet", str(tmp_path / "sheet.png")])
    assert ["gallery", "0", "0", "0"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_set_of_distractors_alone_has_nothing_to_show(tmp_path):
    (tmp_path / "query").mkdir()
    PIL.Image.new("RGB", (4, 8)).save(tmp_path / "query" / "0000_c1s1_000001_00.png")
    with pytest.raises(errors.UserError, match="the set holds nobody but distractors"):
        main(["dukemtmc", "--root", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")])

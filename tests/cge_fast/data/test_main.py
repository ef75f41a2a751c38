"""python -m cge_fast.data"""

import PIL.Image
import pytest

from cge_fast import errors
from cge_fast.config import DataConfig
from cge_fast.data import pedestrians, read
from cge_fast.data.__main__ import main


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
        (["elephants", "--export", "x"], "elephants"),
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

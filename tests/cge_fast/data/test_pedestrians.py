"""The embedded set: its layout, its people, its pixels."""

import hashlib
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cge_fast.data import pedestrians
from cge_fast.data.pedestrians import figure, identities, scene
from cge_fast.errors import UserError
from cge_fast.files import COUNT

SMALL = {"train_identities": 4, "test_identities": 4, "images_per_identity": 6}
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(r"(\d{4})_c([1-6])s1_(\d{6})_(\d{2})\.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "pedestrians"
    pedestrians.draw(folder, **SMALL)
    return folder


def labels(folder: Path) -> list[tuple[int, int]]:
    """(identity, camera) of every file."""
    return [(int(name[1]), int(name[2])) for path in folder.iterdir() if (name := NAME.fullmatch(path.name))]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_names_and_layout(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([COUNT, *FOLDERS])
    paths = [path for name in FOLDERS for path in (folder / name).iterdir()]
    assert all(NAME.fullmatch(path.name) for path in paths)
    assert sorted(int(NAME.fullmatch(path.name)[3]) for path in paths) == list(range(1, 8 * 6 + 1))
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 96))


def test_identities_of_training_and_test_are_disjoint(folder):
    train, query, gallery = ({identity for identity, _ in labels(folder / name)} for name in FOLDERS)
    assert train == {1, 2, 3, 4}
    assert query == gallery == {5, 6, 7, 8}


def test_every_query_has_an_image_of_another_camera_in_the_gallery(folder):
    query, gallery = labels(folder / "query"), labels(folder / "bounding_box_test")
    assert len(set(query)) == len(query)
    assert set(query) == set(query + gallery)
    for identity, camera in query:
        assert any(other == identity and seen_by != camera for other, seen_by in gallery)


def test_same_seed_same_bytes_other_seed_other_bytes(folder, tmp_path):
    pedestrians.draw(tmp_path / "same", **SMALL)
    pedestrians.draw(tmp_path / "other", seed=1, **SMALL)
    assert contents(tmp_path / "same") == contents(folder)
    assert not set(contents(tmp_path / "other").values()) & set(contents(folder).values())


def test_an_image_does_not_depend_on_what_was_drawn_before():
    persons = identities.people(0, False, 4, 4, 6)
    camera = scene.random_camera(identities.generator(0, identities.SHARED, 1))
    first, _, again = (
        pedestrians.photograph(persons[0], persons, camera, identities.generator(0, identities.TRAIN, 1, image))
        for image in (1, 2, 1)
    )
    assert first.tobytes() == again.tobytes()


def test_the_pixels_are_those_of_this_drawing():
    """Another hash is another set: `sets.DRAWING` counts on. Pillow below 11.2.1 draws polygons otherwise.

    The exposure is left out: NumPy's float32 power rounds differently where the processor has AVX512.
    """
    persons = identities.people(0, False, 200, 200, 10)
    pixels = hashlib.sha256()
    for identity in range(0, 200, 25):
        camera = scene.random_camera(identities.generator(0, identities.SHARED, identity % 6 + 1))
        rng = identities.generator(0, identities.TRAIN, identity + 1, 1)
        arranged = scene.arrange(persons[identity], persons, camera, rng)
        pixels.update(scene.through_lens(arranged, camera, rng).tobytes())
    assert pixels.hexdigest() == "8f33e7fba3dd445f5afdb2b0fc272d035d6a2753f255ed58582b0086cbad2358"


@pytest.mark.parametrize("images", [6, 10])
def test_every_identity_is_seen_in_three_to_five_cameras(images):
    seen = [person.cameras for person in identities.people(0, False, 200, 200, images)]
    assert all(len(cameras) == images and set(cameras) <= set(range(1, 7)) for cameras in seen)
    assert {len(set(cameras)) for cameras in seen} == set(range(3, min(5, images // 2) + 1))


@pytest.mark.parametrize("trap", [False, True])
def test_people_are_distinct_and_share_templates(trap):
    persons = identities.people(0, trap, 200, 200, 10)
    train, test = persons[:200], persons[200:]
    for split in (train, test) if trap else (persons,):
        assert len({(person.upper, person.lower, person.head) for person in split}) == len(split)
    assert len({person.lower for person in persons}) == identities.LOWERS
    assert len({person.head for person in persons}) == identities.HEADS
    uppers = [len({person.upper for person in split}) for split in (train, test)]
    assert uppers == ([200, identities.TRAP_TEST_UPPERS] if trap else [identities.UPPERS, identities.UPPERS])


def test_the_trap_draws_other_training_images(folder, tmp_path):
    pedestrians.draw(tmp_path / "trap", trap=True, **SMALL)
    plain, trap = contents(folder), contents(tmp_path / "trap")
    assert len(trap) == len(plain)
    assert trap != plain


def test_logo_and_jacket_show_only_in_front_and_a_backpack_fully_only_from_behind():
    def redness(person, front):
        pose = figure.Pose(front, stride=0.3, swing=0.3, lean=0.0, size=170.0, x=56.0, y=104.0)
        pixels = np.asarray(figure.draw_person(person, pose), dtype=int)
        return (pixels[..., 0] - pixels[..., 1] > 40).sum()

    black, red = identities.BLACK, identities.RED
    lower, head = identities.Lower("trousers", black, black, False), identities.Head("bald", black, black)

    def person(pattern, bag):
        upper = identities.Upper(black, pattern, red, True)
        return identities.Identity(upper, lower, head, bag, red, 1.0, 1.0, [[0.0] * 3] * 2, [])

    for pattern in ("logo", "jacket"):
        assert redness(person(pattern, "none"), front=True) > 0 == redness(person(pattern, "none"), front=False)
    backpack = person("plain", "backpack")
    assert redness(backpack, front=False) > 3 * redness(backpack, front=True)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    calls = defaultdict(int)
    photograph = pedestrians.photograph

    def interrupted(*arguments):
        calls["photograph"] += 1
        if calls["photograph"] == 10:
            raise KeyboardInterrupt
        return photograph(*arguments)

    monkeypatch.setattr(pedestrians, "photograph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pedestrians.draw(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_unless_it_is_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    pedestrians.draw(tmp_path / "empty", **SMALL)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not an empty folder") as refusal:
        pedestrians.draw(tmp_path / "empty", **SMALL)
    assert "\n" not in str(refusal.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("trap", "sizes"),
    [
        (False, {"images_per_identity": 5}),
        (False, {"train_identities": 9000, "test_identities": 1000}),
        (True, {"train_identities": 1000}),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, trap, sizes):
    with pytest.raises(ValueError, match=r"can be drawn|upper bod"):
        pedestrians.draw(tmp_path / "set", trap=trap, **sizes)
    assert list(tmp_path.iterdir()) == []

"""Drawn pedestrians: a seeded person re-identification set in the layout of Market-1501.

A person is a distinct combination of an upper body, a lower body and a head that many others share, so no single region
identifies anybody. In the trap split the training identities have upper bodies of their own and the test identities
share a few: a feature that looked at nothing else in training has little left at test time.
"""

from pathlib import Path

from cge_fast.data.market1501 import FOLDERS
from cge_fast.data.pedestrians.identities import (
    CAMERAS,
    CAMERAS_OF_AN_IDENTITY,
    SHARED,
    TEST,
    TRAIN,
    Identity,
    generator,
    people,
)
from cge_fast.data.pedestrians.scene import photograph, random_camera
from cge_fast.files import new_folder
from cge_fast.progress import progress


def draw(
    folder: Path,
    trap: bool = False,
    seed: int = 0,
    train_identities: int = 200,
    test_identities: int = 200,
    images_per_identity: int = 10,
) -> None:
    """Writes the set below `folder` in the layout of Market-1501: PNG, RGB, 96 pixels high and 48 wide.

    `trap` gives every training identity an upper body of its own, while the test identities share a few. The folder
    appears when the set is complete, or not at all.

    Raises UserError if `folder` exists and is not empty; ValueError if an identity would have fewer than 6
    images, or for more identities than numbers (9999), combinations of templates or, in the trap, upper bodies.
    """
    if images_per_identity < 2 * CAMERAS_OF_AN_IDENTITY[0] or train_identities + test_identities > 9999:
        raise ValueError("at least 6 images per identity and at most 9999 identities can be drawn")
    persons = people(seed, trap, train_identities, test_identities, images_per_identity)
    with new_folder(folder) as unfinished:
        write_images(unfinished, seed, persons, train_identities)


def write_images(folder: Path, seed: int, persons: list[Identity], train_identities: int) -> None:
    """Every image of every person; the first of a test identity in a camera is a query, the rest is gallery."""
    for name in FOLDERS.values():
        (folder / name).mkdir()
    cameras = {number: random_camera(generator(seed, SHARED, number)) for number in range(1, CAMERAS + 1)}
    shots = [(identity, image) for identity, person in enumerate(persons) for image in range(len(person.cameras))]
    for running, (identity, image) in enumerate(progress(shots, what="drawing pedestrians", unit="images"), start=1):
        passed, number = persons[identity].cameras[:image], persons[identity].cameras[image]
        if identity < train_identities:
            split, others, name = TRAIN, persons[:train_identities], "bounding_box_train"
        else:
            split, others = TEST, persons[train_identities:]
            name = "bounding_box_test" if number in passed else "query"
        rng = generator(seed, split, identity + 1, image + 1)
        picture = photograph(persons[identity], others, cameras[number], rng)
        file = f"{identity + 1:04d}_c{number}s1_{running:06d}_{image + 1:02d}.png"
        picture.save(folder / name / file, compress_level=1)

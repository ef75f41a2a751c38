"""The contact sheet of any data set."""

import numpy as np
import PIL.Image

from cge_fast.data import Image, ReidSet
from cge_fast.data.contact_sheet import contact_sheet


def images(folder, identities, each, size=(48, 96)):
    made = []
    for identity in identities:
        for number in range(each):
            path = folder / f"{identity}_{number}.png"
            PIL.Image.effect_noise(size, 90).save(path)
            made.append(Image(path, identity, camera=number))
    return made


def test_a_row_for_each_identity_half_of_them_of_the_test_split(tmp_path):
    test = images(tmp_path, (7, 8, 9), 3)
    reid_set = ReidSet(images(tmp_path, (1, 2, 3), 4), test[:1], test[1:])
    contact_sheet(reid_set, tmp_path / "sheet.png", identities=4)
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (72 + 4 * 64, 4 * 126)
        pixels = np.asarray(sheet)
    assert pixels[:126, 72:].std() > 20
    assert (pixels[3 * 126 :, 72 + 3 * 64 :] == 255).all(), "test identities have but three images"


def test_at_most_twelve_images_of_any_size_and_no_distractors(tmp_path):
    people = images(tmp_path, (1, 2), 14, size=(200, 100))
    reid_set = ReidSet(people[:14], people[14:15], [*people[15:], *images(tmp_path, (0,), 2)])
    contact_sheet(reid_set, tmp_path / "sheet.png")
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (72 + 12 * 64, 2 * (31 + 2))

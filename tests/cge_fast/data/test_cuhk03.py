"""CUHK03's archive and the new protocol's files in miniature."""

import sys

import h5py
import numpy as np
import PIL.Image
import pytest
from scipy.io import savemat

from cge_fast.data import read
from cge_fast.data.counts import Counts, count
from cge_fast.errors import UserError
from cge_fast.options import DataConfig

PEOPLE = (2, 1, 0, 0, 1)  # of each of the five camera pairs
TRAIN = ["1_001_1_01.png", "1_001_1_02.png", "1_001_2_06.png"]
QUERY = ["1_002_1_01.png", "5_001_1_01.png", "5_001_2_06.png"]
GALLERY = ["1_002_2_06.png", "5_001_1_02.png", "5_001_2_10.png"]
CLASSIC_TEST = [(5, 1), (1, 2)]  # camera pair and person, of the first of the 20 classic splits
IMAGES = [*TRAIN, *QUERY, *GALLERY]
IDENTITIES = {"1_001": 1, "1_002": 2, "5_001": 1467}


def pixels(name, boxes):
    """An image 3 pixels high and 2 wide, unlike any other; its top right pixel is red."""
    picture = np.full((3, 2, 3), IMAGES.index(name) + 100 * (boxes == "labeled"), dtype=np.uint8)
    picture[0, 1] = 255, 0, 0
    return picture


def write_archive(file):
    """MATLAB 7.3: cells are references, axes are reversed, an empty cell holds its two sizes."""
    with h5py.File(file, "w", userblock_size=512) as mat:

        def stored(array, **attributes):
            dataset = mat.create_dataset(f"#refs#/{len(mat.require_group('#refs#'))}", data=array)
            dataset.attrs.update(attributes)
            return dataset.ref

        for boxes in ("detected", "labeled"):
            pairs = np.empty((1, 5), dtype=h5py.ref_dtype)
            for pair, people in enumerate(PEOPLE, start=1):
                cells = np.empty((10, people), dtype=h5py.ref_dtype)
                for number, person in np.ndindex(cells.shape):
                    name = f"{pair}_{person + 1:03d}_{1 if number < 5 else 2}_{number + 1:02d}.png"
                    cells[number, person] = (
                        stored(pixels(name, boxes).T)
                        if name in IMAGES
                        else stored(np.zeros(2, dtype=np.uint64), MATLAB_empty=1)
                    )
                pairs[0, pair - 1] = mat.create_dataset(f"#refs#/{boxes}{pair}", data=cells, dtype=h5py.ref_dtype).ref
            mat.create_dataset(boxes, data=pairs, dtype=h5py.ref_dtype)
        splits = np.empty((1, 20), dtype=h5py.ref_dtype)
        for split in range(20):
            test = CLASSIC_TEST if split == 0 else [(1, 1)]
            splits[0, split] = stored(np.array(test, dtype=float).T)
        mat.create_dataset("testsets", data=splits, dtype=h5py.ref_dtype)


def write_protocol(file, **other):
    def index(names):
        return np.array([[IMAGES.index(name) + 1] for name in names], dtype=np.uint16)

    protocol = {
        "train_idx": index(TRAIN),
        "query_idx": index(QUERY),
        "gallery_idx": index(GALLERY),
        "labels": np.array([[float(IDENTITIES[name[:5]])] for name in IMAGES]),
        "camId": np.array([[int(name[6])] for name in IMAGES], dtype=np.uint8),
        "filelist": np.array([[name] for name in IMAGES], dtype=object),
    }
    savemat(file, protocol | other, do_compression=True)


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "cuhk03_release").mkdir()
    write_archive(tmp_path / "cuhk03_release" / "cuhk-03.mat")
    for boxes in ("detected", "labeled"):
        write_protocol(tmp_path / f"cuhk03_new_protocol_config_{boxes}.mat")
    return tmp_path


def cuhk03(root, boxes="detected"):
    return read(DataConfig(name=f"cuhk03-{boxes}", root=root))


@pytest.mark.parametrize("boxes", ["detected", "labeled"])
def test_identities_cameras_and_pixels_follow_the_protocol(archive, boxes):
    found = cuhk03(archive, boxes)
    assert [(image.identity, image.camera) for image in found.train] == [(1, 1), (1, 1), (1, 2)]
    assert [(image.identity, image.camera) for image in found.query] == [(2, 1), (1467, 1), (1467, 2)]
    assert [(image.identity, image.camera) for image in found.gallery] == [(2, 2), (1467, 1), (1467, 2)]
    assert count(found) == {"train": Counts(1, 3, 2), "query": Counts(2, 3, 2), "gallery": Counts(2, 3, 2)}
    for images, names in ((found.train, TRAIN), (found.query, QUERY), (found.gallery, GALLERY)):
        for image, name in zip(images, names, strict=True):
            with PIL.Image.open(image.path) as picture:
                assert np.array_equal(np.asarray(picture), pixels(name, boxes))


def test_images_are_extracted_once_with_a_progress_bar(archive, capsys, monkeypatch):
    with monkeypatch.context() as terminal:
        terminal.setattr("sys.stderr.isatty", lambda: True)
        first = cuhk03(archive)
    assert "extracting detected boxes: " in capsys.readouterr().err
    (archive / "cuhk03_release" / "cuhk-03.mat").unlink()
    assert cuhk03(archive) == first


def test_an_empty_entry_that_the_protocol_names_leaves_nothing_behind(archive):
    names = [name.replace("5_001_2_10", "5_001_2_09") for name in IMAGES]
    write_protocol(
        archive / "cuhk03_new_protocol_config_detected.mat", filelist=np.array([[name] for name in names], dtype=object)
    )
    with pytest.raises(
        UserError, match=r"cuhk-03.mat does not hold the protocol's image 5_001_2_09.png \(the entry is"
    ):
        cuhk03(archive)
    assert [path.name for path in (archive / "cuhk03_release").iterdir()] == ["cuhk-03.mat"]


@pytest.mark.parametrize("absent", ["5_002_1_01.png", "6_001_1_01.png", "1_001_1_11.png", "somebody.png"])
def test_an_image_that_the_archive_does_not_have_is_named(archive, absent):
    names = np.array([[absent], *([name] for name in IMAGES[1:])], dtype=object)
    write_protocol(archive / "cuhk03_new_protocol_config_detected.mat", filelist=names)
    with pytest.raises(UserError, match=rf"cuhk-03.mat does not hold the protocol's image {absent}"):
        cuhk03(archive)


def test_a_missing_file_is_named_with_what_is_found(archive):
    with pytest.raises(UserError, match=r"there is no file .*/cuhk03_release/cuhk-03.mat; .* holds cuhk-03.mat$"):
        cuhk03(archive / "cuhk03_release")
    (archive / "cuhk03_new_protocol_config_labeled.mat").unlink()
    with pytest.raises(
        UserError, match=r"no file .*config_labeled.mat; .* holds cuhk03_new_protocol_config_detected.mat"
    ):
        cuhk03(archive, "labeled")


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_a_damaged_archive_is_named(archive, keep):
    file = archive / "cuhk03_release" / "cuhk-03.mat"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cuhk-03.mat is not a whole MATLAB 7.3 file"):
        cuhk03(archive)


@pytest.mark.parametrize("content", [b"", b"not MATLAB " * 100])
def test_a_damaged_protocol_is_named(archive, content):
    (archive / "cuhk03_new_protocol_config_detected.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"config_detected.mat does not hold the protocol of CUHK03"):
        cuhk03(archive)


def test_a_protocol_that_lacks_a_field_is_named(archive):
    savemat(archive / "cuhk03_new_protocol_config_detected.mat", {"train_idx": [[1]]})
    with pytest.raises(UserError, match=r"config_detected.mat does not hold the protocol of CUHK03 \(KeyError"):
        cuhk03(archive)


@pytest.mark.parametrize("package", ["h5py", "scipy.io"])
def test_without_the_extra_the_error_says_what_to_install(archive, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"CUHK03 needs h5py and scipy: pip install 'cge-fast\[cuhk03\]'"):
        cuhk03(archive)


@pytest.mark.parametrize("boxes", ["detected", "labeled"])
def test_the_classic_split_is_the_first_of_the_archive_and_needs_no_other_file(archive, boxes):
    for protocol in archive.glob("*.mat"):
        protocol.unlink()
    found = cuhk03(archive, f"{boxes}-classic")
    # In the archive's order 1_001 is identity 1, 1_002 is 2, 2_001 (no image) 3 and 5_001 the fourth.
    assert [(image.identity, image.camera) for image in found.train] == [(1, 1), (1, 1), (1, 2)]
    assert [(image.identity, image.camera) for image in found.query] == [(2, 1), (4, 1), (4, 1)]
    assert [(image.identity, image.camera) for image in found.gallery] == [(2, 2), (4, 2)], (
        "one of the second view each"
    )
    assert found.gallery[1].path.name.removeprefix("0004_c2_") in ("5_001_2_06.png", "5_001_2_10.png")
    with PIL.Image.open(found.train[0].path) as picture:
        assert np.array_equal(np.asarray(picture), pixels("1_001_1_01.png", boxes))
    (archive / "cuhk03_release" / "cuhk-03.mat").unlink()
    assert cuhk03(archive, f"{boxes}-classic") == found


def test_an_archive_without_splits_is_named(archive):
    with h5py.File(archive / "cuhk03_release" / "cuhk-03.mat", "a") as mat:
        del mat["testsets"]
    with pytest.raises(UserError, match=r"cuhk-03.mat does not hold the protocol of CUHK03 \(KeyError"):
        cuhk03(archive, "detected-classic")


def test_extracted_images_that_are_lost_are_named(archive):
    next(image.path for image in cuhk03(archive).gallery).unlink()
    with pytest.raises(UserError, match=r"images_detected holds 8 of its 9 files: remove it, and it is made anew"):
        cuhk03(archive)

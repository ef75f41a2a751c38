"""Files of features: what is written is read, and what is wrong is named."""

import errno
import sys

import numpy as np
import pytest
import torch

from cge_fast.errors import UserError
from cge_fast.evaluation.feature_file import FeatureFile, check_output, read, require_alike, write


@pytest.fixture(params=[".npz", ".parquet"])
def file(request, tmp_path):
    if request.param == ".parquet":
        pytest.importorskip("pyarrow", reason="pip install 'cge-fast[search]'")
    return tmp_path / "folder" / f"features{request.param}"


def content(images, identities=(), **others):
    features = torch.randn(images, 5, generator=torch.Generator().manual_seed(0))
    paths = np.array([f"/ä/{number} b.png" for number in range(images)], dtype=str)
    return FeatureFile(features, paths, np.array([*identities])[:images], np.arange(images), **others)


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("identities", [[4, -1, 2**62], ["anna", "", "Bert Ö"]])
def test_what_is_written_is_read(file, images, identities):
    written = content(images, identities, made_by={"model": "0f", "height": 3, "flip_test": False})
    write(file, written)
    found = read(file, "gallery", ["paths", "identities", "cameras"])
    assert torch.equal(found.features, written.features)
    for name in ("paths", "identities", "cameras"):
        assert getattr(found, name).tolist() == getattr(written, name).tolist()
    assert found.made_by == written.made_by


def test_labels_that_are_not_known_are_absent(file):
    write(file, FeatureFile(torch.ones(2, 3)))
    found = read(file, "gallery")
    assert (found.paths, found.identities, found.cameras, found.made_by) == (None, None, None, {})
    with pytest.raises(UserError, match=r"gallery: .*features\..* has no identities, but features"):
        read(file, "gallery", ["identities"])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_features_of_other_precisions_are_read_as_float32(tmp_path, dtype):
    np.savez(tmp_path / "f.npz", features=np.eye(2, 3, dtype=dtype))
    assert torch.equal(read(tmp_path / "f.npz", "query").features, torch.eye(2, 3))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"feature": np.eye(2)}, "has no features, but feature"),
        ({}, "has no features, but nothing"),
        ({"features": np.ones(3)}, r"must be \(N, C\), floating and finite, got \(3,\) float64"),
        ({"features": np.eye(2, dtype=int)}, r"got \(2, 2\) int64"),
        ({"features": np.full((2, 2), np.nan)}, "finite"),
        ({"features": np.eye(2), "identities": np.zeros(3, int)}, r"identities of .* must be \(2,\), numbers or text"),
        ({"features": np.eye(2), "cameras": np.zeros(2)}, r"cameras of .* numbers or text, got \(2,\) float64"),
        ({"features": np.eye(2), "paths": np.zeros(2, int)}, "paths of"),
        ({"features": np.eye(2), "identities": np.array(["a", None])}, "cannot be read"),
        ({"features": np.eye(2), "made_by": np.array("{")}, "cannot be read"),
        ({"features": np.eye(2), "made_by": np.array("[1]")}, "cannot be read"),
        ({"features": np.full((2, 2), 1e39)}, "finite"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(UserError, match=rf"^query: .*{message}"):
        read(tmp_path / "f.npz", "query")


def test_other_programs_tables_may_have_lists_of_one_length(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'cge-fast[search]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "f.parquet"
    for rows in ([[1.0, 2.0], [3.0, 4.0]], []):
        column = pyarrow.array(rows, pyarrow.list_(pyarrow.float64()))
        parquet.write_table(pyarrow.table({"features": column, "other": [b"x"] * len(rows)}), file)
        assert read(file, "query").features.tolist() == rows
    for rows in ([[1.0], [2.0, 3.0, 4.0]], [[1.0, None], [2.0, 3.0]]):
        parquet.write_table(pyarrow.table({"features": rows}), file)
        with pytest.raises(UserError, match=r"^query: "):
            read(file, "query")


def test_a_damaged_file_is_named(file):
    write(file, content(3, "abc"))
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^query: .* cannot be read"):
            read(file, "query")


def test_a_failure_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    file.parent.mkdir()
    file.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(file, content(3, "abc"))
    assert [entry.read_text() for entry in file.parent.iterdir()] == ["old"]


def test_another_format_and_a_missing_package_are_told_before_any_work(tmp_path, monkeypatch):
    for output in (tmp_path, tmp_path / "features.csv"):
        with pytest.raises(UserError, match=r"output: must be a file that ends in .npz or .parquet, got"):
            check_output(output)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    check_output(tmp_path / "features.npz")
    with pytest.raises(UserError, match=r"output: .parquet needs pyarrow: pip install 'cge-fast\[search\]'"):
        check_output(tmp_path / "features.parquet")


def test_features_are_compared_only_with_their_like():
    made = {"model": "0f", "height": 3}
    require_alike(content(2, made_by=made), content(3, made_by=made))
    require_alike(content(2, made_by=made), content(3))
    with pytest.raises(UserError, match="gallery: its features were made with height 4, the queries' with 3"):
        require_alike(content(2, made_by=made), content(2, made_by=made | {"height": 4}))
    with pytest.raises(UserError, match="gallery: its features have 4 numbers, the queries 5"):
        require_alike(content(2), FeatureFile(torch.ones(2, 4)))

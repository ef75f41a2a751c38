"""python -m cge_fast.search"""

import sys

import numpy as np
import PIL.Image
import pytest
import torch
from runs import refused
from support import write_crops

import cge_fast
from cge_fast import embed, errors, search
from cge_fast.evaluation import feature_file
from cge_fast.evaluation.nearest import nearest


@pytest.fixture
def crops(shared_market, tmp_path):
    return write_crops(shared_market, tmp_path / "crops")


@pytest.fixture
def searched(shared_run, tmp_path, capsys):
    """The printed table's rows, by its heads."""

    def run(*options) -> list[dict[str, str]]:
        capsys.readouterr()
        picture = tmp_path / "pictures" / "nearest.png"
        search.main(["--checkpoint", str(shared_run), "--output", str(picture), *map(str, options)])
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == f"{picture} written"
        heads, *cells = (line.split() for line in lines)
        return [dict(zip(heads, row, strict=True)) for row in cells]

    return run


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_nearest_images_of_a_folder_are_listed(searched, shared_run, crops, metric):
    queries = sorted((crops / "query").glob("*/*"))[:2]
    rows = searched("--gallery", crops / "gallery", "--query", *queries, "--top", 3, "--evaluation.metric", metric)
    model, images = cge_fast.load(shared_run, "cpu"), sorted((crops / "gallery").glob("*/*"))
    distance, index = nearest(model.embed(queries), model.embed(images), metric, 3)
    assert [row["image"] for row in rows] == [str(images[place]) for place in index.flatten()]
    assert [row["query"] for row in rows] == [str(query) for query in queries for _ in range(3)]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2
    told = [float(row["similarity" if metric == "cosine" else "distance"]) for row in rows]
    wanted = -distance if metric == "cosine" else (2 * distance).sqrt()
    assert told == pytest.approx(wanted.flatten().tolist(), abs=1e-4)


def test_a_file_of_features_is_searched_with_its_names(searched, shared_run, crops, tmp_path):
    file = tmp_path / "gallery.npz"
    of_set = ["--data.name", "folder", "--data.root", str(crops)]
    embed.main(["--checkpoint", str(shared_run), "--output", str(file), *of_set])
    query = next((crops / "query").glob("0007/*"))
    rows = searched("--gallery", file, "--query", query)
    assert len(rows) == 10
    for row in rows:
        *_, identity, name = row["image"].split("/")
        assert (row["identity"], row["camera"]) == (identity, name[:2])
    by_folder = searched("--gallery", crops / "gallery", "--query", query)
    assert [row["image"] for row in rows] == [row["image"] for row in by_folder]
    with pytest.raises(errors.UserError, match="gallery: its features were made with neck after, the queries' with b"):
        searched("--gallery", file, "--query", query, "--evaluation.neck", "before")


def test_the_picture_has_a_row_for_each_query(searched, crops, tmp_path):
    sizes = []
    for queries in (1, 3):
        searched("--gallery", crops / "gallery", "--query", *sorted((crops / "query").glob("*/*"))[:queries])
        with PIL.Image.open(tmp_path / "pictures" / "nearest.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] > 2 * sizes[0][1]


def test_the_picture_has_its_bounds_but_not_the_table(searched, crops, monkeypatch):
    monkeypatch.setattr(search, "MOST_DRAWN", 2)
    queries = sorted((crops / "query").glob("*/*"))
    drawn = []
    monkeypatch.setattr("cge_fast.analyze.written.write_picture", lambda file, figure: drawn.append(figure))
    rows = searched("--gallery", crops / "gallery", "--query", *queries, "--top", 3)
    assert len(rows) == 4 * 3
    (figure,) = drawn
    assert len(figure.axes[0].images) == 2 * (1 + 2)


def test_a_file_without_features_is_named(searched, crops, shared_run, tmp_path):
    query = next((crops / "query").glob("*/*"))
    file = feature_file.FeatureFile(torch.empty(0, 128), np.array([], dtype=str))
    feature_file.write(tmp_path / "empty.npz", file)
    with pytest.raises(errors.UserError, match=r"gallery: .*empty.npz has no features"):
        searched("--gallery", tmp_path / "empty.npz", "--query", query)


def test_an_image_finds_itself_first_however_it_is_called(searched, crops):
    strange = crops / "gallery" / "0005" / "$a_b$.png"
    next((crops / "gallery").glob("0006/*")).rename(strange)
    (row,) = searched("--gallery", crops / "gallery", "--query", strange, "--top", 1)
    assert (row["image"], row["similarity"]) == (str(strange), "1.0000")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "gallery"),
        (["--gallery", "/nix"], "gallery: must be a file of features that ends in .npz or .parquet, got /nix"),
        (["--gallery", "CROPS", "--query", "/nix.png"], "image /nix.png cannot be read"),
        (["--gallery", "CROPS", "--output", "a.jpg"], "output: must be a file that ends in .png, got a.jpg"),
        (["--gallery", "CROPS", "--top", "0"], "top: "),
        (["--gallery", "CROPS", "--data.name", "folder"], "data.name is not read here"),
    ],
)
def test_wrong_calls_are_one_line(shared_run, crops, tmp_path, capsys, options, message):
    query = str(next((crops / "query").glob("*/*")))
    arguments = ["--checkpoint", str(shared_run), "--query", query, "--output", str(tmp_path / "nearest.png")]
    arguments += [str(crops) if option == "CROPS" else option for option in options]
    assert message in refused(search.main, "cge_fast.search", arguments, capsys)
    assert not (tmp_path / "nearest.png").exists()


def test_a_missing_package_is_told_before_any_work(monkeypatch, shared_run, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(errors.UserError, match=r"needs matplotlib: pip install 'cge-fast\[search\]'"):
        search.main(["--checkpoint", str(shared_run), "--gallery", "/nix", "--query", "/nix.png"])

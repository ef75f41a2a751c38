"""python -m cge_fast.embed"""

import numpy as np
import pytest
import torch
from runs import refused
from support import write_crops

import cge_fast
from cge_fast import embed, errors
from cge_fast.data import read
from cge_fast.data.walk import image_files
from cge_fast.evaluation import feature_file


@pytest.fixture
def embedded(shared_run, tmp_path):
    """What the program writes."""

    def run(*options) -> feature_file.FeatureFile:
        output = tmp_path / "features.npz"
        embed.main(["--checkpoint", str(shared_run), "--output", str(output), *map(str, options)])
        return feature_file.read(output, "output", ["paths"])

    return run


@pytest.mark.parametrize(("split", "images"), [("train", 24), ("query", 4), ("gallery", 20)])
def test_a_data_sets_images_are_written_with_their_labels(embedded, shared_run, capsys, split, images):
    found = embedded("--split", split)
    model = cge_fast.load(shared_run, "cpu")
    wanted = getattr(read(model.config.data), split)
    assert found.paths.tolist() == [str(image.path) for image in wanted]
    assert found.identities.tolist() == [image.identity for image in wanted]
    assert found.cameras.tolist() == [image.camera for image in wanted]
    torch.testing.assert_close(found.features, model.embed([image.path for image in wanted]), rtol=1e-4, atol=1e-5)
    assert f"features.npz written: {images} features of 128 numbers" in capsys.readouterr().out


def test_a_set_that_has_names_is_written_with_them(embedded, shared_market, tmp_path):
    crops = write_crops(shared_market, tmp_path / "crops")
    found = embedded("--data.name", "folder", "--data.root", crops, "--split", "query")
    assert found.identities.tolist() == ["0005", "0006", "0007", "0008"]
    assert found.cameras.tolist() == ["c1"] * 4


def test_a_plain_folder_has_paths_alone_and_damaged_images_may_be_left_out(embedded, shared_market, tmp_path, capsys):
    folder = write_crops(shared_market, tmp_path / "crops")
    found = embedded("--images", folder)
    assert found.identities is found.cameras is None
    assert found.paths.tolist() == [str(path) for path in image_files(folder)]
    (folder / "train" / "broken.png").write_bytes(b"")
    with pytest.raises(errors.UserError, match=r"broken.png cannot be read"):
        embedded("--images", folder)
    assert embedded("--images", folder, "--data.skip_corrupt", "true").paths.tolist() == found.paths.tolist()
    assert "left out 1 corrupt images" in capsys.readouterr().err


def test_a_folder_of_which_no_image_can_be_read_is_named(embedded, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"")
    with pytest.raises(errors.UserError, match=r"images: .*images holds no readable image"):
        embedded("--images", tmp_path / "images", "--data.skip_corrupt", "true")


def test_the_file_says_what_its_features_are_of(embedded, shared_run):
    made_by = embedded("--split", "query", "--evaluation.neck", "before").made_by
    assert (made_by["neck"], made_by["height"], len(made_by["model"])) == ("before", 24, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "f.csv"], "output: must be a file that ends in .npz or .parquet, got f.csv"),
        (["--evaluation.rerank", "true"], "evaluation.rerank is not read here"),
        (["--images", "/nix"], "images: there is no folder /nix"),
        (["--split", "test"], "split"),
        (["--data.root", "/nix"], "data.root: there is no folder /nix"),
    ],
)
def test_wrong_calls_are_one_line_and_leave_nothing(shared_run, tmp_path, capsys, options, message):
    arguments = ["--checkpoint", str(shared_run), "--output", str(tmp_path / "f.npz"), *options]
    assert message in refused(embed.main, "cge_fast.embed", arguments, capsys)
    assert not [*tmp_path.iterdir()]


def test_rows_are_the_images_own(embedded, shared_run):
    found = embedded("--split", "query")
    alone = cge_fast.load(shared_run, "cpu").embed([str(found.paths[2])]).numpy()
    np.testing.assert_allclose(found.features[2:3].numpy(), alone, rtol=1e-4, atol=1e-5)

"""python -m cge_fast.export: what is exported gives the features that evaluation compares."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import torch
from conftest import small_options
from runs import refused
from torch import nn

from cge_fast import checkpoint, errors, export, train
from cge_fast.build import load_model
from cge_fast.cli import read_settings, to_yaml
from cge_fast.data import read
from cge_fast.evaluation.features import embed
from cge_fast.model import ReidModel
from cge_fast.options import DataConfig, EvaluationConfig

HEIGHT, WIDTH = 32, 16  # the files are 24 x 16


@pytest.fixture(scope="module")
def runs(shared_market, tmp_path_factory):
    """Runs of three steps, one for each pooling."""
    folder = tmp_path_factory.mktemp("runs")
    for pooling in ("average", "gem"):
        train.main(
            [
                *(*small_options(shared_market, folder / pooling), "--optim.epochs", "1"),
                *("--evaluation.untrained", "false", "--data.height", str(HEIGHT), "--model.pooling", pooling),
            ]
        )
    return folder


@pytest.fixture
def last(runs, tmp_path, request):
    """A checkpoint with the pooling that the test asks for."""
    run = runs / getattr(request, "param", "average")
    return Path(shutil.copytree(run / "checkpoints" / "last", tmp_path / "checkpoint"))


def change_evaluation(last, **values):
    settings = read_settings(last / "config.yaml")
    for name, value in values.items():
        setattr(settings.evaluation, name, value)
    (last / "config.yaml").write_text(to_yaml(settings))


def eager(last):
    """Embeddings of the queries and gallery as evaluation computes them, and their files' pixels, resized."""
    settings = read_settings(last / "config.yaml")
    model = load_model(last, settings, settings.data, torch.device("cpu"))
    reid_set = read(settings.data)
    images = [*reid_set.query, *reid_set.gallery]
    pixels = [np.asarray(PIL.Image.open(image.path).resize((WIDTH, HEIGHT), PIL.Image.BILINEAR)) for image in images]
    features = embed(model, images, settings.data, settings.evaluation, "all")
    return features.numpy(), np.stack(pixels).transpose(0, 3, 1, 2)


def exported(last, output):
    export.main(["--checkpoint", str(last), "--output", str(output)])
    if output.suffix == ".onnx":
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(["embeddings"], {"images": pixels})[0]
    network = torch.export.load(output).module()
    return lambda pixels: network(torch.from_numpy(pixels)).numpy()


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"])
@pytest.mark.parametrize("last", ["average", "gem"], indirect=True)
def test_embeddings_are_those_of_evaluation_in_batches_of_any_size(last, suffix, tmp_path):
    features, pixels = eager(last)
    for name in (checkpoint.LOSS, checkpoint.TRAINING):  # what is deployed needs neither
        (last / name).unlink()
    embed = exported(last, tmp_path / f"model{suffix}")
    assert pixels.dtype == np.uint8
    for batch in (24, 1, 5):
        found = embed(pixels[:batch])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, features[:batch], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_neck_and_flip_are_the_checkpoints(last, tmp_path):
    plain, _ = eager(last)
    change_evaluation(last, neck="before", flip_test=True)
    features, pixels = eager(last)
    assert not np.allclose(features, plain, atol=1e-2)
    np.testing.assert_allclose(exported(last, tmp_path / "model.pt2")(pixels), features, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("error:No complete tensor")  # torch.export.save, of weights in channels_last
def test_the_graph_has_plain_operators_and_no_weights_of_training(last, tmp_path):
    exported(last, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {call.namespace for call in calls} == {"aten"}
    assert not [name for name in program.state_dict if "classifier" in name or "memory" in name]


@pytest.mark.slow
def test_the_files_say_what_they_take_and_give_but_not_where_they_were_made(last, tmp_path):
    change_evaluation(last, metric="euclidean", flip_test=True)
    exported(last, tmp_path / "model.onnx")
    exported(last, tmp_path / "model.pt2")
    found = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in found.graph.node} == {""}  # ONNX's own operators
    assert [dimension.dim_param for dimension in found.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "",
        "",
        "",
    ]
    metadata = {entry.key: entry.value for entry in found.metadata_props}
    assert metadata == {
        "height": "32",
        "width": "16",
        "interpolation": "bilinear",
        "input": "uint8 RGB, 0 to 255, (batch, 3, height, width), resized by the caller",
        "normalisation": "inside the model: mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225] of values 0 to 1",
        "l2_normalised": "false",
        "metric": "euclidean",
        "neck": "after",
        "flip_test": "true",
        "training_identities": "4",
    }
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"]) == metadata
    assert not [node for node in program.graph.nodes if node.meta.get("stack_trace")]
    assert b"export.py" not in (tmp_path / "model.onnx").read_bytes()


@pytest.mark.parametrize("p", [3.0, 12.0])
def test_pooling_is_the_models_even_for_a_channel_that_is_never_active(p):
    model = ReidModel(nn.Identity(), channels=3, gem=True).eval()
    nn.init.constant_(model.pool.p, p)
    feature_map = torch.rand(4, 3, 6, 2)
    feature_map[:, 1] = 0  # the lower bound is 1e-6, and its 12th power is 0 in float32
    model.neck.running_var[1] = 0  # makes the smallest difference large
    embedding = export.Embedding(model, DataConfig(), EvaluationConfig())
    torch.testing.assert_close(embedding.feature(feature_map), model.embed(feature_map), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_told_before_any_work(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(errors.UserError, match=r"ONNX needs onnx and onnxscript: pip install 'cge-fast\[export\]'"):
        export.main(["--checkpoint", "/nix", "--output", str(tmp_path / "model.onnx")])


def test_a_failure_leaves_the_old_file_and_nothing_else(last, tmp_path, monkeypatch):
    output = tmp_path / "out" / "model.pt2"
    output.parent.mkdir()
    output.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.pt2"):
        export.main(["--checkpoint", str(last), "--output", str(output)])
    assert [file.name for file in output.parent.iterdir()] == ["model.pt2"]
    assert output.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint"),
        (["--checkpoint", "/nix", "--output", "model.pt2"], "checkpoint /nix has no file model.safetensors"),
        (["--checkpoint", "/nix", "--output", "model.pt"], "output: must be a file that ends in .onnx or .pt2, got"),
        (["--checkpoint", "/nix", "--output", "FOLDER"], "output: must be a file that ends in .onnx or .pt2, got"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path, capsys, arguments, message):
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert message in refused(export.main, "cge_fast.export", arguments, capsys)

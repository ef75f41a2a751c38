"""Exports a trained network's embedding to ONNX or torch.export: python -m cge_fast.export --help

What is exported takes images (batch, 3, height, width), uint8, RGB, already resized to the recipe's size (bilinear,
antialiased), in batches of any size. It scales and normalises them itself, once: give it pixels from 0 to 255. It gives
embeddings (batch, C) float32 as `cge_fast.evaluation.features.embed` does with the checkpoint's evaluation settings
(before or after BNNeck, with the mirror image or without). They are not L2-normalised, since the metrics differ in that
alone: for the metric cosine divide each by its norm. Everything is computed in float32, whatever the training's
precision was.
"""

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.transforms import v2

from cge_fast import api, checkpoint, errors, files
from cge_fast.cli import add_settings, as_dataclass, parse_settings, program_parser
from cge_fast.data.augment import mean_and_std
from cge_fast.errors import UserError
from cge_fast.model import ReidModel
from cge_fast.options import DataConfig, EvaluationConfig, TrainConfig

PROGRAM = "cge_fast.export"
METADATA = "metadata.json"  # the extra file of a .pt2


@dataclass
class ExportConfig:
    """Settings of an export."""

    checkpoint: Path
    """Folder of the checkpoint, like runs/.../checkpoints/last, or of the run."""
    output: Path
    """File to write: .onnx for ONNX, .pt2 for torch.export."""


class Embedding(nn.Module):
    """From uint8 images (B, 3, H, W) to embeddings (B, C) float32."""

    def __init__(self, model: ReidModel, data: DataConfig, evaluation: EvaluationConfig):
        super().__init__()
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*mean_and_std(data))])
        # torch.export.save takes weights in channels_last for slices of others, and warns.
        self.backbone, self.pool = model.backbone.to(memory_format=torch.contiguous_format), model.pool
        self.neck = model.neck if evaluation.neck == "after" else nn.Identity()
        self.flip_test = evaluation.flip_test

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings."""
        images = self.normalise(images)
        if self.flip_test:
            return (self.feature(images) + self.feature(images.flip(3))) / 2
        return self.feature(images)

    def feature(self, images: Tensor) -> Tensor:
        """(B, C) of normalised images (B, 3, H, W)."""
        pooled, _ = self.pool(self.backbone(images), stripes=1)
        return self.neck(pooled)


def load(folder: Path | str) -> tuple[Embedding, TrainConfig, dict[str, str]]:
    """The embedding of a checkpoint's network, on the CPU, its settings, and what a user of the export must know.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    opened = api.load(folder, "cpu")
    trained = opened.config
    embedding = Embedding(opened.model, trained.data, trained.evaluation).eval().requires_grad_(False)
    mean, std = mean_and_std(trained.data)
    metadata = {
        "height": str(trained.data.height),
        "width": str(trained.data.width),
        "interpolation": trained.data.interpolation,
        "input": "uint8 RGB, 0 to 255, (batch, 3, height, width), resized by the caller",
        "normalisation": f"inside the model: mean {list(mean)}, std {list(std)} of values 0 to 1",
        "l2_normalised": "false",
        "metric": trained.evaluation.metric,
        "neck": trained.evaluation.neck,
        "flip_test": str(trained.evaluation.flip_test).lower(),
        "training_identities": str(checkpoint.identities(opened.folder)),
    }
    return embedding, trained, metadata


def as_onnx(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """ONNX, with the metadata as the model's metadata_props; input "images", output "embeddings"."""
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes={"images": {0: "batch"}},
        verbose=False,
    )
    onnx.model.metadata_props.update(metadata)
    return onnx.model_proto.SerializeToString()


def as_pt2(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """What `torch.export.load` reads, with the metadata as its extra file metadata.json."""
    buffer = io.BytesIO()  # to a file on a full disk, torch would end the process
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


FORMATS: dict[str, Callable[[ExportedProgram, dict[str, str]], bytes]] = {".onnx": as_onnx, ".pt2": as_pt2}


def check_output(output: Path) -> None:
    """Raises UserError, before any work, if the file's format is unknown or cannot be written."""
    if output.suffix not in FORMATS or output.is_dir():
        raise UserError(f"output: must be a file that ends in {' or '.join(FORMATS)}, got {output}")
    if output.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError("output: ONNX needs onnx and onnxscript: pip install 'cge-fast[export]'") from error


def export(folder: Path | str, output: Path | str) -> None:
    """Exports the checkpoint in `folder` to the file `output`, which is written whole or not at all.

    Raises:
        UserError: the checkpoint cannot be read, or the output's format is unknown or its packages are not installed.
    """
    output = Path(output)
    check_output(output)
    embedding, trained, metadata = load(folder)
    example = torch.zeros(2, 3, trained.data.height, trained.data.width, dtype=torch.uint8)
    program = torch.export.export(embedding, (example,), dynamic_shapes={"images": {0: Dim("batch")}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this computer, which would be written to the file
    output.parent.mkdir(parents=True, exist_ok=True)
    files.replace(output, FORMATS[output.suffix](program, metadata))


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; `arguments` default to the command line's."""
    purpose = "Exports a trained network's embedding to ONNX or torch.export."
    parser = program_parser(PROGRAM, purpose, "--checkpoint DIR --output FILE")
    add_settings(parser, ExportConfig)
    parsed = parse_settings(parser, sys.argv[1:] if arguments is None else arguments)
    config = as_dataclass(parser, parsed, ExportConfig)
    export(config.checkpoint, config.output)
    print(f"{config.output} written")


if __name__ == "__main__":
    errors.run(main, PROGRAM)

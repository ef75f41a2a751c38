"""Backbone and head as one network, and the features it gives."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cge_fast import backbones, checkpoint
from cge_fast.data import Image, ReidSet
from cge_fast.data.batches import test_loader
from cge_fast.distributed import gather, rank, world_size
from cge_fast.errors import UserError
from cge_fast.evaluation.ranking import Retrieval, evaluate_ranking
from cge_fast.evaluation.reranking import evaluate_reranking
from cge_fast.losses.cge import CGEHead, HeadOutput
from cge_fast.operators import Kernels, check_backend
from cge_fast.options import DataConfig, EvaluationConfig, LossConfig, ModelConfig, TrainConfig


class ReidModel(nn.Module):
    """A backbone with a CGE head; the backbone computes in `precision` and channels_last, the head in float32."""

    def __init__(self, backbone: nn.Module, head: CGEHead, precision: torch.dtype = torch.float32):
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.head, self.precision = head, precision

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, H', W') of images (B, 3, H, W)."""
        lower = self.precision != torch.float32
        with torch.autocast(images.device.type, self.precision if lower else None, enabled=lower):
            return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> HeadOutput | Tensor:
        """The head's output: see CGEHead."""
        return self.head(self.feature_map(images), labels)


def build(
    model: ModelConfig,
    loss: LossConfig,
    data: DataConfig,
    num_classes: int,
    epochs: int,
    precision: torch.dtype,
    kernels: Kernels,
) -> ReidModel:
    """The network that the settings describe, on the CPU.

    Raises:
        UserError: more stripes than the feature map has rows, images too small for the backbone, or weights to start
            from that cannot be had or do not fit.
    """
    backbone = backbones.build(model.backbone, model.pretrained, model.weights, model.non_local, model.map_norm)
    channels, height, width = backbones.map_size(backbone, data.height, data.width)
    if (
        model.cge
        and model.revision == "features"
        and (model.pooling, loss.classification) != ("average", "cross_entropy")
    ):
        raise UserError(
            "model.revision: features goes with model.pooling average and loss.classification cross_entropy, got "
            f"{model.pooling} and {loss.classification}"
        )
    if model.cge and not 1 <= model.stripes <= height:
        raise UserError(
            f"model.stripes: {model.stripes} do not fit the feature map, which has {height} rows and {width} columns "
            f"for images of {data.height} x {data.width}"
        )
    # e' of the form that spreads e' over all classes: e over the others is e N/(N-1) over all.
    spread = num_classes / max(1, num_classes - 1) if loss.smoothed == "others" else 1.0
    try:
        head = CGEHead(
            channels,
            num_classes,
            epochs,
            stripes=model.stripes,
            pooling=model.pooling,
            alpha=model.alpha,
            cge=model.cge,
            revision=model.revision,
            shuffle_memory=model.shuffle_memory,
            classification=loss.classification,
            label_smoothing=loss.label_smoothing * spread,
            classifier_std=model.classifier_std,
            logit_scale=model.logit_scale,
            local_gradient=model.local_gradient,
            kernels=kernels,
            shard_classes=model.shard_classes,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    return ReidModel(backbone, head, precision)


def compute_precision(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of the backbone's arithmetic; "auto" is bfloat16 where the device computes it in hardware.

    Raises:
        UserError: the device cannot compute in the dtype that was asked for.
    """
    if setting == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        return torch.bfloat16 if native else torch.float32
    if setting == "float16" and device.type == "cpu":
        raise UserError("optim.precision: float16 needs a GPU, use bfloat16 or float32 on a CPU")
    return getattr(torch, setting)


def load(folder: Path, trained: TrainConfig, data: DataConfig, device: torch.device) -> ReidModel:
    """The network of a checkpoint that was trained with the settings `trained`, for images as `data` sizes them.

    Raises:
        UserError: the folder is no checkpoint, its weights do not fit its settings, or the device cannot compute so.
    """
    weights = checkpoint.load_weights(folder)
    check_backend(trained.kernels, device)
    only_on_gpu = trained.optim.precision == "float16" and device.type == "cpu"
    precision = compute_precision("auto" if only_on_gpu else trained.optim.precision, device)
    without_pretrained = replace(
        trained.model, pretrained=False, weights=None, shard_classes=False
    )  # the checkpoint's weights follow
    classes = checkpoint.classes(weights, folder)
    network = build(without_pretrained, trained.loss, data, classes, trained.optim.epochs, precision, trained.kernels)
    checkpoint.fit(network, weights, folder)
    return network.to(device)


@torch.no_grad()
def embed(model: ReidModel, images: list[Image], data: DataConfig, evaluation: EvaluationConfig, name: str) -> Tensor:
    """Features (len(images), C) float32 on the model's device, with a progress bar called `name`.

    The ranks share the images and every rank returns all features.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    after_neck = evaluation.neck == "after"
    # A first, empty one: with fewer images than ranks some have nothing to do.
    features = [torch.empty(0, model.head.classifier.in_features, device=device)]
    loader = test_loader(images[rank() :: world_size()], evaluation.batch, data)
    for batch in tqdm(loader, desc=f"features, {name}", unit=" batch", leave=False, disable=rank() > 0):
        batch = batch.to(device, non_blocking=True)
        feature = model.head.embed(model.feature_map(batch), after_neck)
        if evaluation.flip_test:
            feature = (feature + model.head.embed(model.feature_map(batch.flip(3)), after_neck)) / 2
        features.append(feature)
    model.train(training)
    order = torch.cat([torch.arange(first, len(images), world_size()) for first in range(world_size())])
    return gather(torch.cat(features))[order.argsort().to(device)]


def evaluate(model: ReidModel, reid_set: ReidSet, data: DataConfig, evaluation: EvaluationConfig) -> Retrieval:
    """mAP, mINP and CMC of a network on the query and gallery of a set.

    Raises:
        UserError: a feature is not finite, or no query has a match.
    """
    arguments = []
    for name, images in (("query", reid_set.query), ("gallery", reid_set.gallery)):
        features = embed(model, images, data, evaluation, name)
        identities = torch.tensor([image.identity for image in images], device=features.device)
        cameras = torch.tensor([image.camera for image in images], device=features.device)
        arguments += [features, identities, cameras]
    evaluated = evaluate_reranking if evaluation.rerank else evaluate_ranking
    try:
        return evaluated(*arguments, metric=evaluation.metric, progress=rank() == 0)
    except ValueError as error:
        raise UserError(f"evaluation: {error}") from error

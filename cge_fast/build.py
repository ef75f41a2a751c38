"""From settings to a run: data, model, criterion and optimizer."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import cge_kernels
from cge_fast import backbones, checkpoint, data
from cge_fast.backbones.recompute import recompute_stages
from cge_fast.compiled import check_compile, compile_training
from cge_fast.data.augment import Augment
from cge_fast.data.batches import train_labels, train_loader
from cge_fast.data.sampler import PKSampler
from cge_fast.distributed import rank, world_size
from cge_fast.errors import UserError
from cge_fast.loggers import check_loggers
from cge_fast.losses.cge import CGELoss
from cge_fast.losses.criterion import ReidCriterion
from cge_fast.losses.metric import CenterLoss, MetricLoss
from cge_fast.losses.softmax import SoftmaxLoss
from cge_fast.model import ReidModel
from cge_fast.optimizer import Average, build_optimizer, parameter_groups
from cge_fast.options import Backend, DataConfig, TrainConfig
from cge_kernels import ClassShard
from cge_kernels.common.dispatch import runs_on_triton

Variants = Mapping[str, type[nn.Module]]
NO_VARIANTS: Variants = MappingProxyType({})


@dataclass
class Run:
    """Everything that a training consists of, and how far it is."""

    config: TrainConfig  # `config.output` is set
    device: torch.device
    reid_set: data.ReidSet
    sampler: PKSampler
    loader: DataLoader
    augment: Augment  # what the loader gives, but labels, to images for the model
    num_classes: int  # N: identities in training
    model: ReidModel
    criterion: ReidCriterion
    ddp_model: nn.Module  # in DistributedDataParallel where there are several ranks, and so is the next
    ddp_criterion: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average[ReidModel] | None  # of the model's weights; then it is what is evaluated and deployed
    scaler: torch.amp.GradScaler
    epochs_done: int = 0
    best_map: float = -math.inf
    evaluations_since_best: int = 0
    untrained: dict[str, float] | None = None  # what evaluation gave before the first epoch
    result: dict[str, float] | None = None  # and after the last
    frozen: list[nn.Parameter] = field(default_factory=list)  # the backbone's that learn later or again
    row: dict[str, Any] | None = None  # of metrics.jsonl, for the last epoch

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.config.output / "checkpoints"

    @property
    def deployed(self) -> ReidModel:
        """The network that is evaluated and that `model.safetensors` holds: the average, or what is trained."""
        return self.average.module if self.average else self.model

    @property
    def shard(self) -> ClassShard | None:
        """The classes whose rows this rank has; None if it has all."""
        return getattr(self.criterion.classification, "shard", None)


def build_run(config: TrainConfig, device: torch.device, variants: Variants = NO_VARIANTS) -> Run:
    """A run that has not begun.

    Args:
        config: the settings; `config.output` is set.
        device: where to compute.
        variants: losses that take CGELoss's or SoftmaxLoss's place, by their names for `loss.variant`. One is called as
            Class(in_channels, num_classes, **arguments of CGELoss or SoftmaxLoss, **loss.variant_args), and may have a
            `model_class` in ReidModel's place.

    Raises:
        UserError: data and settings do not fit, or the device cannot compute so.
    """
    check_backend(config.backend, device)
    check_loggers(config.loggers)
    torch.manual_seed(config.seed)
    reid_set = data.read(config.data, ["train"], optional=["query", "gallery"])
    labels = train_labels(reid_set.train)
    num_classes = max(labels) + 1
    batch = config.data.identities, config.data.instances
    sampler = PKSampler(labels, *batch, config.seed, rank(), world_size(), config.data.sampler)
    check_batch(config)
    loader = train_loader(reid_set.train, sampler, config.data, pin_memory=device.type == "cuda")
    precision = compute_precision(config.optim.precision, device)
    if config.model.shard_classes and precision == torch.float16:
        raise UserError("model.shard_classes: float16's loss scaling would differ between ranks, use bfloat16")
    check_cuda_graph(config, device)
    check_compile(config.optim)
    model = build_model(config, config.data, precision, loss_class(config, variants))
    if world_size() > 1 and device.type == "cuda":  # SyncBatchNorm exists on GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    wants_copy = precision != torch.float32 and (device.type == "cuda" or config.optim.precision != "auto")
    memory_dtype = precision if wants_copy else None  # unasked not on a CPU, whose operators add up in float32 anyway
    criterion = build_criterion(config, model.neck.num_features, num_classes, variants, memory_dtype)
    model, criterion = model.to(device), criterion.to(device)
    average = Average(model, config.optim.ema) if config.optim.ema else None
    if config.optim.checkpoint_backbone:
        recompute_stages(model.backbone)
    optimizer = build_optimizer(config.optim, parameter_groups(config.optim, model.backbone, model, criterion))
    run = Run(
        config=config,
        device=device,
        reid_set=reid_set,
        sampler=sampler,
        loader=loader,
        augment=Augment(config.data).to(device),
        num_classes=num_classes,
        model=model,
        criterion=criterion,
        ddp_model=model,
        ddp_criterion=criterion,
        optimizer=optimizer,
        average=average,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
    )
    if config.optim.cuda_graph:
        capture(model, config)
    if config.optim.compile:
        compile_training(model, criterion)
    if world_size() > 1:
        # No broadcast of buffers at every step: the memory is equal anyway, statistics are shared once an epoch.
        frozen = config.optim.freeze_backbone > 0  # a frozen backbone gets no gradients
        run.ddp_model = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=frozen)
        if run.shard is None and any(True for _ in criterion.parameters()):
            run.ddp_criterion = DistributedDataParallel(criterion, broadcast_buffers=False)
    return run


def check_cuda_graph(config: TrainConfig, device: torch.device) -> None:
    """Raises UserError if optim.cuda_graph is set where it cannot be."""
    for is_wrong, reason in (
        (device.type != "cuda", "there is no GPU"),
        (world_size() > 1, "it is for one process, since DistributedDataParallel takes no graph"),
        (config.optim.freeze_backbone > 0, "a frozen backbone has another graph: optim.freeze_backbone"),
        (config.optim.accumulate > 1, "a graph's gradients are overwritten by the next micro-batch: optim.accumulate"),
    ):
        if config.optim.cuda_graph and is_wrong:
            raise UserError(f"optim.cuda_graph: must be false, {reason}")


def capture(model: ReidModel, config: TrainConfig) -> None:
    """From now on the model's forward and backward in training are CUDA graphs; the batches all have one shape."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shape = config.data.identities * config.data.instances, 3, config.data.height, config.data.width
    torch.cuda.make_graphed_callables(model.train(), (torch.zeros(shape, device=model.neck.weight.device),))
    for name, buffer in model.named_buffers():  # BatchNorm has seen these images some times over
        buffer.copy_(buffers[name])
    model.neck.not_yet_tracked = 0


def check_batch(config: TrainConfig) -> None:
    """Raises UserError unless a batch can be cut into micro-batches, and each trained on."""
    share, pieces = config.data.identities // world_size(), config.optim.accumulate
    if share % pieces:
        raise UserError(f"optim.accumulate: {share} identities cannot be cut evenly into {pieces}")
    if config.loss.metric_weight and config.data.identities // pieces < 2:
        raise UserError(
            "loss.metric_weight: the metric loss needs 2 identities in a micro-batch, so at least twice as many "
            f"data.identities as optim.accumulate, got {config.data.identities} and {pieces}"
        )
    if share // pieces * config.data.instances < 2:
        raise UserError("data.instances: BatchNorm needs 2 images in a process's micro-batch, got 1")


def chosen_backend(name: Backend) -> AbstractContextManager:
    """Inside, the operators run on the backend; "auto" leaves the choice to CGE_BACKEND."""
    return nullcontext() if name == "auto" else cge_kernels.backend(name)


def check_backend(name: Backend, device: torch.device) -> None:
    """Raises UserError, before any work, if CGE_BACKEND or CGE_SCRATCH_MB is wrong or the device cannot run it."""
    try:
        cge_kernels.scratch_bytes()
        with chosen_backend(name):
            runs_on_triton(torch.empty(0, device=device))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


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


def build_model(
    config: TrainConfig, data: DataConfig, precision: torch.dtype, loss: type[nn.Module] = CGELoss
) -> ReidModel:
    """The network that the settings describe, on the CPU.

    Args:
        config: the settings of its training.
        data: how large its images are.
        precision: of the backbone's arithmetic.
        loss: the classification loss, whose `model_class`, if it has one, takes the place of ReidModel.

    Raises:
        UserError: more stripes than the feature map has rows, images too small for the backbone, or weights to start
            from that cannot be had or do not fit.
    """
    model = config.model
    size = config.data.height, config.data.width
    backbone = backbones.build(
        model.backbone, model.pretrained, model.weights, model.non_local, model.map_norm, model.stem, size
    )
    channels, height, width = backbones.map_size(backbone, data.height, data.width)
    if model.cge and not 1 <= model.stripes <= height:
        raise UserError(
            f"model.stripes: {model.stripes} do not fit the feature map, which has {height} rows and {width} columns "
            f"for images of {data.height} x {data.width}"
        )
    model_class = getattr(loss, "model_class", ReidModel)
    made = model_class(backbone, channels, model.stripes if model.cge else 1, model.pooling == "gem", precision)
    if made.pool.p is not None:
        made.pool.p.requires_grad_(model.gem_learned)
    return made


def loss_class(config: TrainConfig, variants: Variants = NO_VARIANTS) -> type[nn.Module]:
    """CGELoss, SoftmaxLoss, or what `loss.variant` names.

    Raises:
        UserError: there is no such variant, or it does not go with model.cge.
    """
    name = config.loss.variant
    if not name:
        return CGELoss if config.model.cge else SoftmaxLoss
    if name not in variants:
        known = (
            f"one of {', '.join(variants)}" if variants else "empty; python -m cge_fast.experiments.variants has some"
        )
        raise UserError(f"loss.variant: must be {known}, got {name}")
    if hasattr(variants[name], "write_memory") != config.model.cge:
        raise UserError(f"loss.variant: {name} goes with model.cge {str(not config.model.cge).lower()}")
    return variants[name]


def build_criterion(
    config: TrainConfig,
    channels: int,
    num_classes: int,
    variants: Variants = NO_VARIANTS,
    memory_dtype: torch.dtype | None = None,
) -> ReidCriterion:
    """The training loss that the settings describe, on the CPU, with this rank's rows of its classes.

    memory_dtype: of the memory's copy that a CGELoss reads, or None.

    Raises:
        UserError: the arguments do not fit the classification loss, or there are fewer classes than ranks.
    """
    model, loss, classification = config.model, config.loss, loss_class(config, variants)
    # e' of the form that spreads e' over all classes: e over the others is e N/(N-1) over all.
    spread = num_classes / max(1, num_classes - 1) if loss.smoothed == "others" else 1.0
    arguments: dict[str, Any] = {
        "label_smoothing": loss.label_smoothing * spread,
        "classifier_std": model.classifier_std,
        **({"stripes": model.stripes} if model.cge else {}),
    }
    try:
        if model.shard_classes and classification is not CGELoss:
            raise ValueError(f"shard_classes needs cge and the loss CGELoss, got {classification.__name__}")
        if model.shard_classes and world_size() > 1:
            arguments["shard"] = ClassShard.of_rank(num_classes, rank(), world_size())
        if memory_dtype and issubclass(classification, CGELoss):
            arguments["memory_dtype"] = memory_dtype
        made = classification(channels, num_classes, **arguments, **loss.variant_args)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    except TypeError as error:
        raise UserError(f"loss.variant_args: {error}") from error
    center = CenterLoss(num_classes, channels, loss.center_lr) if loss.center_weight else None
    return ReidCriterion(made, MetricLoss(loss.metric, loss.margin, num_classes, channels), center, loss.weights)


def load_model(
    folder: Path, trained: TrainConfig, data: DataConfig, device: torch.device, variants: Variants = NO_VARIANTS
) -> ReidModel:
    """The network of a checkpoint that was trained with the settings `trained`, for images as `data` sizes them.

    With `variants` it is the model that the variant's loss is computed of; without, the one to use.

    Raises:
        UserError: the folder is no checkpoint, its weights do not fit its settings, or the device cannot compute so.
    """
    weights = checkpoint.load_model(folder)
    only_on_gpu = trained.optim.precision == "float16" and device.type == "cpu"
    precision = compute_precision("auto" if only_on_gpu else trained.optim.precision, device)
    # The checkpoint's weights follow.
    without_pretrained = replace(trained, model=replace(trained.model, pretrained=False, weights=None))
    model = build_model(without_pretrained, data, precision, loss_class(trained, variants) if variants else CGELoss)
    checkpoint.fit(model, weights, folder)
    return model.to(device)


def load_criterion(
    folder: Path, trained: TrainConfig, device: torch.device, variants: Variants = NO_VARIANTS
) -> ReidCriterion:
    """The training loss of a checkpoint, whole, for analyses; its `classification` has classifier and memory.

    Raises:
        UserError: the folder is no checkpoint, or its loss does not fit its settings.
    """
    tensors = checkpoint.load_loss(folder)
    whole = replace(trained, model=replace(trained.model, shard_classes=False))
    channels = len(checkpoint.load_model(folder)["neck.weight"])
    criterion = build_criterion(whole, channels, checkpoint.identities(folder), variants)
    checkpoint.fit(criterion, tensors, folder)
    return criterion.to(device)

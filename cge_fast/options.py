"""Every setting of the programs, typed; the defaults are the recipe pedestrians_cge."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from cge_fast.backbones.build import Backbone
from cge_fast.backbones.non_local import NonLocal
from cge_fast.errors import UserError
from cge_fast.losses.cge import Alpha, Pooling, Revision
from cge_fast.losses.metric import Metric
from cge_fast.losses.softmax import Classification
from cge_fast.operators import Kernels

Settings = TypeVar("Settings")
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
ErasingArea = restricted_number_type("ErasingArea", float, [(">=", 0.02), ("<=", 1)])

RECIPES = Path(__file__).parent / "recipes"

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass
class DataConfig:
    """The data set and how its images become batches."""

    name: Literal[
        "pedestrians",
        "pedestrians-trap",
        "market1501",
        "msmt17",
        "msmt17-train-only",
        "cuhk03-detected",
        "cuhk03-labeled",
        "veri776",
        "folder",
    ] = "pedestrians"
    """Data set; the pedestrians are drawn on first use, the others are read from data.root."""
    root: Path | None = None
    """Folder of a data set that is not drawn."""
    height: PositiveInt = 96
    """Image height after resizing, pixels."""
    width: PositiveInt = 48
    """Image width after resizing, pixels."""
    flip: ClosedUnitInterval = 0.5
    """Probability of a horizontal flip."""
    pad: NonNegativeInt = 4
    """Zeros padded on each side before a random crop back to size, pixels; 0 for none."""
    erasing: ClosedUnitInterval = 0.5
    """Probability of random erasing (aspect 0.3 to 3.33)."""
    erasing_area: ErasingArea = 0.4
    """Largest share of the image that is erased; the smallest is 0.02."""
    erased: Literal["zero", "mean"] = "zero"
    """What is written there after normalisation: zero (the mean colour) or ImageNet's mean (BagTricks' public code)."""
    normalisation: Literal["imagenet", "luperson"] = "imagenet"
    """Mean and standard deviation of the colours: ImageNet's, or LUPerson's for its weights."""
    identities: PositiveInt = 16
    """P: identities in a batch, over all ranks."""
    instances: PositiveInt = 4
    """K: images of each identity in a batch."""
    workers: NonNegativeInt = 2
    """Processes that load images; 0 loads in the training process. The batches are the same for any number."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say how many, instead of ending with an error."""


@dataclass
class ModelConfig:
    """Backbone and head."""

    backbone: Backbone = "compact"
    """Network below the head."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights."""
    weights: Path | None = None
    """Start from the backbone's weights in this file: .pth or .pt (torchvision's names, MoCo's too) or .safetensors."""
    non_local: NonLocal = "none"
    """AGW's non-local blocks: none, with one inner channel (its public code), or with half of the channels."""
    map_norm: bool = False
    """BatchNorm of the feature map before the head, as in LUPerson's code."""
    pooling: Pooling = "average"
    """Pooling of the global and the local features."""
    cge: bool = True
    """Comprehensive Global Embedding; false is the BagTricks baseline."""
    stripes: PositiveInt = 3
    """n: horizontal stripes, each a local classifier."""
    alpha: Alpha = "linear"
    """How much of a memory row stays at a write, by epoch."""
    revision: Revision = "logits"
    """What the weights multiply: the logits, the classifier's N maps before they are pooled, or none of them."""
    local_gradient: bool = True
    """Let the gradient flow through the revision's weights to the backbone."""
    shuffle_memory: bool = False
    """A control: revise by a memory whose rows are permuted among the identities."""
    classifier_std: PositiveFloat = 0.001
    """Standard deviation of the classifier's weights at the start: 0.001 in BagTricks, 0.01 in FastReID."""
    logit_scale: PositiveFloat = 1.0
    """Factor of the logits; revision alone multiplies them by about 0.7, so compare with baselines scaled alike."""
    shard_classes: bool = False
    """Under torchrun, give each process the classifier's and the memory's rows of some identities only."""
    shard_checkpoints: bool = False
    """With shard_classes, let each process write its rows to a file of its own; else they are put together first."""


@dataclass
class LossConfig:
    """l1 * classification loss + l2 * metric loss + centre * centre loss."""

    classification: Classification = "cross_entropy"
    """Loss of the logits, revised if there is CGE; sphere: cross entropy with SphereFace's angular margin of 4."""
    label_smoothing: ClosedUnitInterval = 0.1
    """e: the target is (1-e) * onehot + e/N."""
    smoothed: Literal["all", "others"] = "all"
    """What e is spread over: all classes (e/N each), or the other ones (e/(N-1) each), as FastReID does."""
    metric: Metric = "triplet"
    """Loss of the features before BNNeck: batch-hard triplet, AGW's weighted regularisation triplet, ..."""
    margin: NonNegativeFloat | Literal["soft"] = 0.3
    """Triplet margin (hinge), or soft: log(1 + exp(d_ap - d_an))."""
    l1: NonNegativeFloat = 1.0
    """Weight of the classification loss."""
    l2: NonNegativeFloat = 1.0
    """Weight of the metric loss."""
    centre: NonNegativeFloat = 0.0
    """Weight of the centre loss; AGW's published settings have 5e-4."""
    centre_lr: PositiveFloat = 0.5
    """Learning rate of the centres."""


@dataclass
class OptimConfig:
    """Adam, warm-up and steps."""

    epochs: PositiveInt = 30
    """Epochs; one is floor(train images / (P*K)) batches."""
    lr: PositiveFloat = 2e-3
    """Learning rate after warm-up."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay (coupled L2, on every parameter)."""
    warmup: NonNegativeFloat = 0.1
    """Length of the linear warm-up: epochs, or below 1 a share of all epochs."""
    warmup_steps: NonNegativeInt = 0
    """Length of the warm-up in optimiser steps; 0: as `warmup` says."""
    warmup_factor: PositiveFloat = 0.1
    """Learning rate at the start of the warm-up, as a factor."""
    by_epoch: bool = False
    """Change the learning rate once an epoch, by its number counted from 1, not at every step."""
    milestones: list[PositiveFloat] = field(default_factory=lambda: [0.6, 0.85])
    """When the learning rate falls: epochs done, or below 1 shares of all epochs."""
    milestones_after_warmup: bool = False
    """Count the milestones' epochs from the end of the warm-up."""
    gamma: PositiveFloat = 0.1
    """Factor at each milestone."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Backbone's arithmetic; auto: bfloat16 where the device has it in hardware, else float32."""
    accumulate: PositiveInt = 1
    """Micro-batches that a batch is cut into (P / ranks divisible by it), to train with less device memory."""


@dataclass
class EvaluationConfig:
    """How query and gallery are compared."""

    every: NonNegativeInt = 5
    """Evaluate after every so many epochs (and always after the last); 0: only after the last."""
    untrained: bool = True
    """Evaluate the untrained network too, as a floor for the figures."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance of two features."""
    neck: Literal["after", "before"] = "after"
    """Take the feature after BNNeck or before it."""
    flip_test: bool = False
    """Average the features of an image and its mirror image."""
    rerank: bool = False
    """Re-rank with k-reciprocal neighbours (k1 20, k2 6, lambda 0.3); it looks at all queries at once."""
    batch: PositiveInt = 128
    """Images per forward pass."""


@dataclass
class TrainConfig:
    """Settings of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    kernels: Kernels = "fused"
    """Operators: fused kernels, the same with pooling and revision in one pass, or the plain reference."""
    seed: Seed = 0
    """Seed of initialisation, sampling and augmentation."""
    output: Path | None = None
    """Folder of the run; without it runs/<date>-<time>."""


def program_parser(program: str, description: str) -> ArgumentParser:
    """A typed command line whose errors are exceptions."""
    return ArgumentParser(prog=program, description=description, exit_on_error=False, allow_abbrev=False)


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """The command line with `--config NAME` turned into the path of the recipe called so."""
    found = list(arguments)
    for index, argument in enumerate(found):
        option, equals, value = argument.partition("=")
        if option == "--config" and equals and value in recipes():
            found[index] = f"--config={RECIPES / value}.yaml"
        elif index and found[index - 1] == "--config" and argument in recipes():
            found[index] = str(RECIPES / f"{argument}.yaml")
    return found


def parse_settings(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parses a command line.

    Raises:
        ArgumentError, UserError: a key is unknown, a value of the wrong type or out of range, a file not readable.
    """
    try:
        return parser.parse_args(list(arguments))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config: the file is not YAML in UTF-8 ({error})") from error


def as_dataclass(parser: ArgumentParser, parsed: Namespace, kind: type[Settings]) -> Settings:
    """The parsed settings as an instance of the dataclass whose fields the parser was given.

    Raises:
        UserError: a section is not a mapping.
    """
    for settings in fields(kind):
        if is_dataclass(settings.type) and not isinstance(parsed[settings.name], Namespace):
            raise UserError(f"{settings.name}: must be a section of settings, got {parsed[settings.name]!r}")
    values = parser.instantiate(parsed)
    return plain(kind(**{settings.name: values[settings.name] for settings in fields(kind)}))


def plain(value: Any) -> Any:
    """Settings with ordinary numbers in place of the range-checked ones, which neither YAML nor torch.load knows."""
    if is_dataclass(value):
        return replace(value, **{settings.name: plain(getattr(value, settings.name)) for settings in fields(value)})
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if isinstance(value, float) else int(value)
    return value


def to_yaml(config: TrainConfig) -> str:
    """The settings as YAML that --config reads back."""
    values = asdict(config)
    for section, key in ((values, "output"), (values["data"], "root"), (values["model"], "weights")):
        section[key] = None if section[key] is None else str(section[key])
    return yaml.safe_dump(values, sort_keys=False)


def read_settings(file: Path) -> TrainConfig:
    """The settings that `to_yaml` wrote.

    Raises:
        ArgumentError, UserError: the file is not such settings.
    """
    parser = program_parser("", "")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig)
    return as_dataclass(parser, parse_settings(parser, [f"--config={file}"]), TrainConfig)

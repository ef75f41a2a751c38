"""Every setting of the programs, typed; the defaults are the recipe pedestrians_cge. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, restricted_number_type, restricted_string_type

from cge_fast.files import at_home

DataSet = Literal[
    "pedestrians",
    "pedestrians-trap",
    "market1501",
    "dukemtmc",
    "occluded-duke",
    "msmt17",
    "msmt17-train-only",
    "cuhk03-detected",
    "cuhk03-labeled",
    "cuhk03-detected-classic",
    "cuhk03-labeled-classic",
    "veri776",
    "vehicleid-800",
    "vehicleid-1600",
    "vehicleid-2400",
    "veri-wild-3000",
    "veri-wild-5000",
    "veri-wild-10000",
    "folder",
    "market",
]
SeveralSets = restricted_string_type("SeveralSets", r"[a-z0-9-]+(\+[a-z0-9-]+)+")
TimmName = restricted_string_type("TimmName", r"^timm:[\w.]+$")
Backbone = (
    Literal["compact", "resnet18", "resnet34", "resnet50", "resnet101", "resnet50_ibn_a", "efficientnet_lite0"]
    | TimmName
)
NonLocal = Literal["none", "one", "half"]
Stem = Literal["torchvision", "without_relu", "ceil_pool"]
Pooling = Literal["average", "gem"]
MemoryMomentum = Literal["linear", "exponential", "constant"]
Metric = Literal["triplet", "wrt", "wrt_published", "contrastive", "lifted", "instance", "circle", "sphere"]
Backend = Literal["auto", "triton", "cpu", "reference"]
# Ranges, so that a slip of the keyboard (inf, 1e30) is an error at once, and not a training without sense or memory.
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
ErasingArea = restricted_number_type("ErasingArea", float, [(">=", 0.02), ("<=", 1)])
PositiveInt = restricted_number_type("BoundedPositiveInt", int, [(">", 0), ("<=", 10**6)])
NonNegativeInt = restricted_number_type("BoundedNonNegativeInt", int, [(">=", 0), ("<=", 10**9)])
PositiveFloat = restricted_number_type("BoundedPositiveFloat", float, [(">", 0), ("<=", 10**6)])
NonNegativeFloat = restricted_number_type("BoundedNonNegativeFloat", float, [(">=", 0), ("<=", 10**6)])
FiniteFloat = restricted_number_type("FiniteFloat", float, [(">=", -(10**6)), ("<=", 10**6)])
Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])
PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
Size = restricted_number_type("Size", int, [(">", 0), ("<=", 4096)])
Padding = restricted_number_type("Padding", int, [(">=", 0), ("<=", 4096)])
BatchPart = restricted_number_type("BatchPart", int, [(">", 0), ("<=", 65536)])
Workers = restricted_number_type("Workers", int, [(">=", 0), ("<=", 512)])


@dataclass
class DataConfig:
    """The data set and how its images become batches."""

    name: DataSet | SeveralSets = "pedestrians"
    """Data set; the pedestrians are drawn on first use, the others are read from data.root. Of several, like a+b, all
    are trained on and the first is evaluated; the program evaluate takes each by itself."""
    root: Path | None = None
    """Folder of a data set that is not drawn; of several sets that of all, or one for each, like A+B."""
    held_out: ClosedUnitInterval = 0.0
    """Share of the identities of several cameras that becomes query and gallery, in a folder or market set that has
    only images to train on; which they are depends on the identities alone."""
    height: Size = 96
    """Image height after resizing, pixels."""
    width: Size = 48
    """Image width after resizing, pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized: bilinear as in BagTricks, bicubic as in FastReID."""
    jitter: ClosedUnitInterval = 0.0
    """Probability of a change of brightness, contrast, saturation and hue."""
    autoaugment: ClosedUnitInterval = 0.0
    """Probability of AutoAugment with its policy for ImageNet."""
    flip: ClosedUnitInterval = 0.5
    """Probability of a horizontal flip."""
    pad: Padding = 4
    """Zeros padded on each side before a random crop back to size, pixels; 0 for none."""
    erasing: ClosedUnitInterval = 0.5
    """Probability of random erasing."""
    erasing_aspect: Literal["uniform", "log_uniform"] = "log_uniform"
    """How height / width, 0.3 to 3.33, is drawn: uniform (up to 100 tries) in Random Erasing's code and BagTricks',
    log-uniform (up to 10) in torchvision's."""
    erasing_area: ErasingArea = 0.4
    """Largest share of the image that is erased; the smallest is 0.02."""
    erased: Literal["zero", "mean", "black"] = "zero"
    """What is written there: after normalisation zero (the mean colour) or ImageNet's mean (BagTricks' public code), or
    black (LUPerson's for its weights)."""
    normalisation: Literal["imagenet", "luperson", "half"] = "imagenet"
    """Mean and standard deviation of the colours: ImageNet's, LUPerson's for its weights, or 0.5 and 0.5 for those that
    come from TensorFlow."""
    identities: BatchPart = 16
    """P: identities in a batch, over all ranks."""
    instances: BatchPart = 4
    """K: images of each identity in a batch."""
    sampler: Literal["balanced", "naive", "random"] = "balanced"
    """Identities of a batch: each once before any twice, or (naive, FastReID) those with K unseen images left, in
    passes that go on over the epochs, or (random, BagTricks) the same, where an epoch is one pass."""
    workers: Workers = 2
    """Processes that load images; 0 loads in the training process. The batches are the same for any number."""
    cache: Literal["none", "ram", "disk"] = "none"
    """Where decoded and resized images are kept: nowhere, in each process's memory, or in a file below $CGE_CACHE
    (~/.cache/cge-fast) that all processes share and later runs find again."""
    skip_corrupt: bool = False
    """Leave out images that cannot be read, and say how many, instead of ending with an error."""

    @property
    def roots(self) -> list[Path | None]:
        """The folders in `root`, one but for several sets, like A+B; None for one that is left out, like A in +B."""
        named = [] if self.root is None else str(self.root).split("+") if "+" in self.name else [str(self.root)]
        return [at_home(Path(root)) if root else None for root in named]


@dataclass
class ModelConfig:
    """Backbone, pooling, classifier and memory."""

    backbone: Backbone = "compact"
    """Network below the head: compact, resnet18, resnet34, resnet50, resnet101, resnet50_ibn_a, efficientnet_lite0, or
    timm:NAME for one of timm's."""
    pretrained: bool = False
    """Start from ImageNet's weights: torchvision's, timm's, or the package's of efficientnet_lite0."""
    weights: Path | None = None
    """Start from the backbone's weights in this file: .pth or .pt (torchvision's or timm's names, MoCo's too) or
    .safetensors."""
    stem: Stem = "torchvision"
    """A ResNet's first layers: torchvision's, without the ReLU (BagTricks' and AGW's code), or FastReID's pooling."""
    non_local: NonLocal = "none"
    """AGW's non-local blocks: none, with one inner channel (its public code), or with half of the channels."""
    map_norm: bool = False
    """BatchNorm of the feature map before the head, as in LUPerson's code."""
    pooling: Pooling = "average"
    """Pooling of the global and the local features."""
    gem_learned: bool = True
    """Learn GeM's exponent p; false keeps it at 3, as FastReID's and LUPerson's AGW do."""
    cge: bool = True
    """Comprehensive Global Embedding; false is the BagTricks baseline."""
    stripes: Size = 3
    """n: horizontal stripes, each a local classifier."""
    memory_momentum: MemoryMomentum = "linear"
    """How much of a memory row a write keeps, by epoch (the paper's alpha)."""
    classifier_std: PositiveFloat = 0.001
    """Standard deviation of the classifier's weights at the start: 0.001 in BagTricks, 0.01 in FastReID."""
    shard_classes: bool = False
    """Under torchrun, give each process the classifier's and the memory's rows of some identities only."""
    shard_checkpoints: bool = False
    """With shard_classes, let each process write its rows to a file of its own; else they are put together first."""


@dataclass
class LossConfig:
    """classification_weight * classification loss + metric_weight * metric loss + center_weight * center loss."""

    variant: str = ""
    """A loss in the place of CGELoss or SoftmaxLoss, by a name that the program knows; train knows none."""
    variant_args: dict[str, FiniteFloat] = field(default_factory=dict)
    """Its arguments besides those that CGELoss or SoftmaxLoss would get."""
    classification_weight: NonNegativeFloat = 1.0
    """Weight of the classification loss."""
    label_smoothing: ClosedUnitInterval = 0.1
    """e: the target is (1-e) * onehot + e/N."""
    smoothed: Literal["all", "others"] = "all"
    """What e is spread over: all classes (e/N each), or the other ones (e/(N-1) each), as FastReID does."""
    metric: Metric = "triplet"
    """Loss of the features before BNNeck; wrt is AGW's as its equation says, or published, as its code computes it."""
    metric_weight: NonNegativeFloat = 1.0
    """Weight of the metric loss."""
    margin: NonNegativeFloat | Literal["soft"] = 0.3
    """Triplet margin (hinge), or soft: log(1 + exp(d_ap - d_an))."""
    center_weight: NonNegativeFloat = 0.0
    """Weight of the center loss; AGW's published settings have 5e-4."""
    center_lr: PositiveFloat = 0.5
    """Learning rate of the centers."""

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the classification, the metric and the center loss."""
        return self.classification_weight, self.metric_weight, self.center_weight


@dataclass
class OptimConfig:
    """Optimizer, warm-up and steps."""

    epochs: PositiveInt = 30
    """Epochs; one is floor(train images / (P*K)) batches, or what data.sampler random gives."""
    lr: PositiveFloat = 2e-3
    """Learning rate after warm-up."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Adam, AdamW (whose weight decay is decoupled), or SGD with momentum 0.9."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay of every parameter: with adam and sgd L2 in the gradient, with adamw decoupled."""
    clip: NonNegativeFloat = 0.0
    """Gradient clipping: the largest norm of all gradients together, to which they are scaled down; 0: none."""
    ema: Decay = 0.0
    """Decay of the weights' exponential moving average, 0.999 say, which is then evaluated and deployed; 0: there is no
    average."""
    warmup: NonNegativeFloat = 0.1
    """Length of the linear warm-up: epochs, or below 1 a share of all epochs."""
    warmup_steps: NonNegativeInt = 0
    """Length of the warm-up in optimizer steps; 0: as `warmup` says."""
    warmup_factor: PositiveFloat = 0.1
    """Learning rate at the start of the warm-up, as a factor."""
    by_epoch: bool = False
    """Change the learning rate once an epoch, by its number counted from 1, not at every step."""
    milestones: list[PositiveFloat] = field(default_factory=lambda: [0.6, 0.85])
    """When the learning rate falls: epochs done, or below 1 shares of all epochs."""
    milestones_after_warmup: bool = False
    """Count the milestones' epochs from the last whole epoch of the warm-up, as FastReID does."""
    gamma: PositiveFloat = 0.1
    """Factor at each milestone."""
    schedule: Literal["multistep", "cosine", "one_cycle"] = "multistep"
    """After the warm-up the rate falls at the milestones, or (cosine) along half a cosine to 0.002 of it, or
    (one_cycle) the same, after a warm-up that is half a cosine too."""
    patience: NonNegativeInt = 0
    """Early stopping: end the training after so many evaluations in a row without a better mAP; 0: never."""
    backbone_lr: PositiveFloat = 1.0
    """Learning rate of the backbone, as a factor."""
    layer_decay: PositiveShare = 1.0
    """Learning rate of each layer of the backbone, as a share of the next one's; 1 for all alike."""
    freeze_backbone: NonNegativeInt = 0
    """Epochs at the start in which the backbone does not learn, and its BatchNorm takes its running statistics as they
    are."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the backbone, and of the classifier's and the memory's matmuls; auto: bfloat16 where the device has
    it in hardware (on a CPU for the backbone alone), else float32."""
    accumulate: BatchPart = 1
    """Micro-batches that a batch is cut into (P / ranks divisible by it), to train with less device memory."""
    checkpoint_backbone: bool = False
    """Activation checkpointing: keep only the inputs of the backbone's stages for the backward, and compute the rest
    again; less device memory, for the time of one more forward."""
    compile: bool = False
    """Compile the network and the classification loss for training with torch.compile, in the first step."""
    cuda_graph: bool = False
    """Launch the network's forward and backward as one CUDA graph each; for one process and one micro-batch."""


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
    batch: BatchPart = 128
    """Images per forward pass."""


@dataclass
class TrainConfig:
    """Settings of a training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    backend: Backend = "auto"
    """Operators: Triton kernels on a GPU and else for the CPU, or one of these, or the plain reference."""
    seed: Seed = 0
    """Seed of initialisation, sampling and augmentation."""
    loggers: list[Literal["wandb", "mlflow"]] = field(default_factory=list)
    """Where the figures of an epoch go besides metrics.jsonl and TensorBoard."""
    output: Path | None = None
    """Folder of the run; without it runs/<date>-<time>."""


# What evaluation and analyses do not read, and what only those read that rank.
TRAINING_ONLY = {"data.flip", "data.pad", "data.erasing", "data.erasing_aspect", "data.erasing_area", "data.erased"}
TRAINING_ONLY |= {"data.identities", "data.instances", "data.sampler", "evaluation.every", "evaluation.untrained"}
TRAINING_ONLY |= {"data.jitter", "data.autoaugment"}
RANKING_ONLY = {"evaluation.metric", "evaluation.neck", "evaluation.flip_test", "evaluation.rerank"}

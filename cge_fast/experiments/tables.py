"""The rows of the paper's tables, and the controls that the paper lacks."""

from dataclasses import dataclass, replace

MOST_STRIPES = 12
BOT, CGE = "BOT", "CGE+BOT"
WITHOUT, WITH = "--model.cge false", "--model.cge true"
AGW = "--model.non_local half --model.pooling gem --model.gem_learned false --loss.metric wrt"
UPT = (
    "--model.pretrained false --model.weights weights/lup_moco_r50.pth --model.map_norm true "
    "--data.normalisation luperson"
)
VARIANT, SCALE = "--loss.variant", "--loss.variant_args.scale"


@dataclass(frozen=True)
class Row:
    """One training of a table."""

    name: str  # as the table prints it; unique in the table
    options: str  # what it adds to the command line of the preset, separated by spaces
    base: str | None = None  # name of the row that it is compared with
    scaled_by: str | None = None  # options of the CGE training whose mean weight multiplies this row's logits
    stripes: int = 3  # n; the row is left out where the feature map has fewer rows
    resnet50: bool = False  # starts from weights that are ResNet-50's alone; small presets leave it out


def comparison(name: str, options: str = "", variant: str = "") -> list[Row]:
    """A method without and with CGE, and the controls.

    Revision multiplies the logits by weights near 0.7: the method's logits are scaled so too, by the mean weight of the
    CGE training and by 0.5, that of classes never seen. The weights' gradient and the memory's contents are taken away
    one at a time. `variant` is the method's loss, whose name with CGE begins with cge_; empty for cross entropy.
    """
    cge, of_cge = f"CGE+{name}", variant and f"cge_{variant}"
    scaled = joined(WITHOUT, options, loss(variant or "scaled"))
    with_cge = joined(WITH, options, loss(of_cge))
    detached, shuffled = (
        joined(WITH, options, loss(f"{of_cge}_{control}".strip("_")))
        for control in ("detached_weights", "shuffled_memory")
    )
    return [
        Row(name, joined(WITHOUT, options, loss(variant))),
        Row(f"{name}, logits x 0.5", f"{scaled} {SCALE} 0.5", name),
        Row(f"{name}, logits x mean w", scaled, name, scaled_by=with_cge),
        Row(cge, with_cge, name),
        Row(f"{cge}, detached weights", detached, name),
        Row(f"{cge}, shuffled memory", shuffled, name),
    ]


def joined(*options: str) -> str:
    """The options that are not empty, in one text."""
    return " ".join(filter(None, options))


def loss(variant: str) -> str:
    """The option that chooses a variant of the loss; none for the published losses."""
    return variant and f"{VARIANT} {variant}"


def stripes() -> list[Row]:
    """n = 1 ... 12; that of the controls is 3, the recipes' own, so that tables share that training."""
    controls = comparison(BOT)
    numbers = [
        replace(controls[3], name=f"CGE, n = {n}", options=WITH if n == 3 else f"{WITH} --model.stripes {n}", stripes=n)
        for n in range(1, MOST_STRIPES + 1)
    ]
    return [*controls[:3], *numbers, *(replace(row, name=f"{row.name}, n = 3") for row in controls[4:])]


def alphas() -> list[Row]:
    """Strategies of the memory's momentum, the paper's alpha; the baseline's memory is written but not used."""
    rows = comparison(BOT)
    unused = Row(f"{BOT}, memory not used", f"{WITH} {loss('memory_not_used')}", BOT)
    momentum = f"{WITH} --model.memory_momentum"
    others = [Row(f"CGE, alpha {name}", f"{momentum} {name}", BOT) for name in ("exponential", "constant")]
    return [*rows[:3], unused, replace(rows[3], name="CGE, alpha linear"), *others, *rows[4:]]


def regularisation() -> list[Row]:
    """Random erasing, label smoothing and the losses' weights, the paper's l1 and l2."""
    methods = {
        "": "",
        **{f"erasing p {probability}": f"--data.erasing {probability}" for probability in ("0", "0.25", "0.75")},
        **{f"erasing area {area}": f"--data.erasing_area {area}" for area in ("0.2", "0.6")},
        **{f"smoothing {smoothing}": f"--loss.label_smoothing {smoothing}" for smoothing in ("0", "0.2")},
        **{
            f"l1 {l1}, l2 {l2}": f"--loss.classification_weight {l1} --loss.metric_weight {l2}"
            for l1, l2 in (("1", "0"), ("0.5", "1"), ("1", "0.5"))
        },
    }
    return [row for name, options in methods.items() for row in comparison(name or BOT, options)]


TITLES = {
    "table1": "Number of stripes n (a), and the precision of each stripe's classifier (b)",
    "table2": "Strategy of the memory's alpha, and the precision of each stripe's classifier",
    "table3": "Revision of the logits or of the classifier's maps",
    "table4": "Losses of the logits, with and without CGE",
    "table5": "Losses of pairs, with and without CGE",
    "table6": "Other metric losses, with and without CGE",
    "table7": "Regularisation: erasing, smoothing, weights of the losses",
    "table8": "CGE on four baselines",
    "table9": "CGE on a set of vehicles",
}

TABLES: dict[str, list[Row]] = {
    "table1": stripes(),
    "table2": alphas(),
    "table3": [
        *comparison(BOT),
        Row("CGE+BOT, revised maps", f"{WITH} {loss('revised_maps')}", BOT),
        Row("CGE+BOT, memory not used", f"{WITH} {loss('memory_not_used')}", BOT),
    ],
    "table4": [row for name in ("", "focal", "sphere") for row in comparison(name or BOT, variant=name)],
    **{
        table: [*comparison(BOT), *(row for name in losses for row in comparison(name, f"--loss.metric {name}"))]
        for table, losses in (("table5", ("contrastive", "lifted")), ("table6", ("instance", "circle")))
    },
    "table7": regularisation(),
    "table8": [
        *comparison(BOT),
        *comparison("AGW", AGW),
        *(replace(row, resnet50=True) for row in comparison("UPT-BOT", UPT)),
        *(replace(row, resnet50=True) for row in comparison("UPT-AGW", f"{AGW} {UPT}")),
    ],
    "table9": [*comparison(BOT), *comparison("AGW", AGW)],
}

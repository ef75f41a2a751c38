"""The rows of the paper's tables, and the controls that the paper lacks."""

from dataclasses import dataclass, replace

MOST_STRIPES = 12
BOT, CGE = "BOT", "CGE+BOT"
WITHOUT, WITH = ("--model.cge", "false"), ("--model.cge", "true")
AGW = ("--model.non_local", "one", "--model.pooling", "gem", "--loss.metric", "wrt")
UPT = (
    *("--model.pretrained", "false", "--model.weights", "weights/lup_moco_r50.pth", "--model.map_norm", "true"),
    *("--data.normalisation", "luperson"),
)


@dataclass(frozen=True)
class Row:
    """One training of a table.

    Args:
        name: as the table prints it; unique in the table.
        options: what it adds to the command line of the preset.
        base: name of the row that it is compared with, or None.
        scaled_by: options of the CGE training whose mean weight multiplies this row's logits, or None.
        stripes: n; the row is left out where the feature map has fewer rows.
        resnet50: the row starts from weights that are ResNet-50's alone; small presets leave it out.
    """

    name: str
    options: tuple[str, ...]
    base: str | None = None
    scaled_by: tuple[str, ...] | None = None
    stripes: int = 3
    resnet50: bool = False


def comparison(name: str, *options: str) -> list[Row]:
    """A method without and with CGE, and the controls.

    Revision multiplies the logits by weights near 0.7: the method's logits are scaled so too, by the mean weight of the
    CGE training and by 0.5, that of classes never seen. The weights' gradient and the memory's contents are taken away
    one at a time.
    """
    cge = f"CGE+{name}"
    return [
        Row(name, (*WITHOUT, *options)),
        Row(f"{name}, logits x 0.5", (*WITHOUT, *options, "--model.logit_scale", "0.5"), name),
        Row(f"{name}, logits x mean w", (*WITHOUT, *options), name, scaled_by=(*WITH, *options)),
        Row(cge, (*WITH, *options), name),
        Row(f"{cge}, detached weights", (*WITH, *options, "--model.local_gradient", "false"), name),
        Row(f"{cge}, shuffled memory", (*WITH, *options, "--model.shuffle_memory", "true"), name),
    ]


def stripes() -> list[Row]:
    """n = 1 ... 12; that of the controls is 3."""
    controls = comparison(BOT)
    numbers = [
        replace(controls[3], name=f"CGE, n = {n}", options=with_stripes(n), stripes=n)
        for n in range(1, MOST_STRIPES + 1)
    ]
    return [*controls[:3], *numbers, *(replace(row, name=f"{row.name}, n = 3") for row in controls[4:])]


def with_stripes(n: int) -> tuple[str, ...]:
    """Options of CGE with n stripes; 3 is the recipes' own, so that tables share that training."""
    return WITH if n == 3 else (*WITH, "--model.stripes", str(n))


def alphas() -> list[Row]:
    """Strategies of the memory's alpha; the memory of the baseline is written but not used."""
    rows = comparison(BOT)
    unused = Row(f"{BOT}, memory not used", (*WITH, "--model.revision", "none"), BOT)
    others = [Row(f"CGE, alpha {alpha}", (*WITH, "--model.alpha", alpha), BOT) for alpha in ("exponential", "constant")]
    return [*rows[:3], unused, replace(rows[3], name="CGE, alpha linear"), *others, *rows[4:]]


def regularisation() -> list[Row]:
    """Random erasing, label smoothing and the losses' weights."""
    rows = comparison(BOT)
    for probability in ("0", "0.25", "0.75"):
        rows += comparison(f"erasing p {probability}", "--data.erasing", probability)
    for area in ("0.2", "0.6"):
        rows += comparison(f"erasing area {area}", "--data.erasing_area", area)
    for smoothing in ("0", "0.2"):
        rows += comparison(f"smoothing {smoothing}", "--loss.label_smoothing", smoothing)
    for l1, l2 in (("1", "0"), ("0.5", "1"), ("1", "0.5")):
        rows += comparison(f"l1 {l1}, l2 {l2}", "--loss.l1", l1, "--loss.l2", l2)
    return rows


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
        Row("CGE+BOT, revised maps", (*WITH, "--model.revision", "features"), BOT),
        Row("CGE+BOT, memory not used", (*WITH, "--model.revision", "none"), BOT),
    ],
    "table4": [
        *comparison(BOT),
        *comparison("focal", "--loss.classification", "focal"),
        *comparison("sphere", "--loss.classification", "sphere"),
    ],
    "table5": [
        *comparison(BOT),
        *comparison("contrastive", "--loss.metric", "contrastive"),
        *comparison("lifted", "--loss.metric", "lifted"),
    ],
    "table6": [
        *comparison(BOT),
        *comparison("instance", "--loss.metric", "instance"),
        *comparison("circle", "--loss.metric", "circle"),
    ],
    "table7": regularisation(),
    "table8": [
        *comparison(BOT),
        *comparison("AGW", *AGW),
        *(replace(row, resnet50=True) for row in comparison("UPT-BOT", *UPT)),
        *(replace(row, resnet50=True) for row in comparison("UPT-AGW", *AGW, *UPT)),
    ],
    "table9": [*comparison(BOT), *comparison("AGW", *AGW)],
}

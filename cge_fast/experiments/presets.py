"""What every training of an experiment has in common, by preset and data set."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cge_fast.data.sets import pedestrians
from cge_fast.errors import UserError

OTHER_PEOPLE = 1  # seed of the drawing that the small preset's backbone is trained on first


@dataclass(frozen=True)
class Preset:
    """Trainings that differ in a row's options only; options are as a shell takes them."""

    options: str
    rows: int  # H' of the feature map: the most stripes that fit
    first: Callable[[], str] | None = None  # options of a training whose backbone all others start from


QUIET = "--evaluation.untrained false --evaluation.every 0 --data.workers 0"
OMNIGLOT = "--data.name market1501 --data.flip 0 --model.pretrained false"
PAPER_ROWS = 24


def other_people() -> str:
    """Options of the training on other drawn people, who are drawn now if they are not in the cache."""
    root = shlex.quote(str(pedestrians(seed=OTHER_PEOPLE)))
    return f"--config pedestrians_bot --data.name market1501 --data.root {root} {QUIET} --optim.epochs 20"


PRESETS: dict[str, dict[str, Preset]] = {
    "small": {
        # From scratch, 200 steps teach little; the paper starts from ImageNet's or other people's images as well.
        "pedestrians": Preset(
            f"--config pedestrians_cge {QUIET} --data.identities 8 --optim.epochs 2 --optim.lr 1e-3",
            rows=12,
            first=other_people,
        ),
        "omniglot": Preset(
            f"{OMNIGLOT} {QUIET} --data.height 32 --data.width 32 --data.pad 2 --optim.epochs 3", rows=4
        ),
    },
    "paper": {
        "pedestrians": Preset("--config pedestrians_cge", rows=12),
        "omniglot": Preset(f"{OMNIGLOT} --data.height 64 --data.width 64 --model.backbone resnet18", rows=4),
        **{
            name: Preset(f"--config cge_bot --data.name {name}", rows=PAPER_ROWS)
            for name in ("market1501", "msmt17", "msmt17-train-only", "cuhk03-detected", "cuhk03-labeled", "veri776")
        },
    },
}
DATA = list(PRESETS["paper"])


def preset_of(name: str, data: str, root: Path | None) -> Preset:
    """The preset `name` for a data set.

    Raises:
        UserError: the preset is not for that set, or its folder is not given.
    """
    if data not in PRESETS[name]:
        raise UserError(f"preset: {name} is for {' and '.join(PRESETS[name])}, not for {data}; leave it out")
    preset = PRESETS[name][data]
    if data == "pedestrians":
        return preset
    if root is None:
        raise UserError(f"root: the data set {data} needs the folder where it lies")
    return replace(preset, options=f"{preset.options} --data.root {shlex.quote(str(root))}")

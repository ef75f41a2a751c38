"""What every training of an experiment has in common, by preset and data set."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cge_fast.data.sets import pedestrians
from cge_fast.errors import UserError
from cge_fast.experiments.runs import is_whole, run
from cge_fast.experiments.tables import UPT, Row

OTHER_PEOPLE = 1  # seed of the drawing that the small preset's backbone is trained on first


@dataclass(frozen=True)
class Preset:
    """Trainings that differ in a row's options only; options are as a shell takes them."""

    options: str
    rows: int  # H' of the feature map: the most stripes that fit
    first: Callable[[], str] | None = None  # options of a training whose backbone all others start from
    upt: bool = False  # of a ResNet-50, which LUPerson's weights fit; without them UPT-BOT is BOT


@dataclass(frozen=True)
class Place:
    """A data set, how it is trained on, and where."""

    data: str
    preset: Preset
    output: Path  # folder of its trainings and tables
    common: list[str]  # command line of every training

    def fitted(self, rows: Sequence[Row]) -> list[Row]:
        """The rows as they are trained here."""
        if self.preset.upt:
            return list(rows)

        def without_upt(options: str | None) -> str | None:
            return options and " ".join(options.replace(UPT, "").split())

        return [replace(row, options=without_upt(row.options), scaled_by=without_upt(row.scaled_by)) for row in rows]

    def trained(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the fitted rows whose stripes the feature map has rows for."""
        return [row for row in self.fitted(rows) if row.stripes <= self.preset.rows]


QUIET = "--evaluation.untrained false --evaluation.every 0 --data.workers 0"
PRETRAINED = f"--config pedestrians_pretrained {QUIET}"
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
    "small-pretrained": {
        "pedestrians": Preset(f"{PRETRAINED} --data.identities 8 --optim.epochs 1", rows=8),
        "omniglot": Preset(
            f"{PRETRAINED} --data.name market1501 --data.flip 0 --data.height 64 --data.width 64 --optim.epochs 2",
            rows=4,
        ),
    },
    "paper": {
        "pedestrians": Preset("--config pedestrians_cge", rows=12),
        "omniglot": Preset(f"{OMNIGLOT} --data.height 64 --data.width 64 --model.backbone resnet18", rows=4),
        **{
            name: Preset(f"--config cge_bot --data.name {name}", rows=PAPER_ROWS, upt=True)
            for name in ("market1501", "msmt17", "msmt17-train-only", "cuhk03-detected", "cuhk03-labeled", "veri776")
        },
    },
}
DATA = list(PRESETS["paper"])
DRAWN = "pedestrians"  # the set that has no folder of its own


def place_of(name: str, data: str, root: Path | None, output: Path, more: Sequence[str] = ()) -> Place:
    """A data set under the preset `name`, below the folder `output`; what all its trainings start from is trained now.

    Raises:
        UserError: the preset is not for that set.
    """
    if data not in PRESETS[name]:
        raise UserError(f"preset: {name} is for {' and '.join(PRESETS[name])}, not for {data}; leave it out")
    preset, output = PRESETS[name][data], output / f"{data}-{name}"
    common = shlex.split(preset.options) + ([] if root is None else ["--data.root", str(root)])
    if preset.first:
        first = output / "first"
        if not is_whole(first):
            print(f"first, the backbone that every training starts from: {first}", file=sys.stderr)
            run(first, shlex.split(preset.first()))
        common += ["--model.weights", str(first / "checkpoints" / "last" / "model.safetensors")]
    return Place(data, preset, output, [*common, *more])

"""The paper's tables and figures as rows to train (tables.yaml), and the controls that the paper lacks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WITHOUT, WITH = "--model.cge false", "--model.cge true"
VARIANT, SCALE, STRIPES = "--loss.variant", "--loss.variant_args.scale", "--model.stripes"
AGW = "--model.non_local half --model.pooling gem --model.gem_learned false --loss.metric wrt"
UPT = (
    "--model.pretrained false --model.weights weights/lup_moco_r50.pth --model.map_norm true "
    "--data.normalisation luperson --data.erased black"
)
STARTS = {
    "BOT": "",
    "UPT-BOT": UPT,
    "AGW": AGW,
    "UPT-AGW": f"{AGW} {UPT}",
    "UPT-BOT exponential": f"{UPT} --model.memory_momentum exponential",
}


@dataclass(frozen=True)
class Row:
    """One training of a table."""

    name: str  # as the paper prints it; unique in the table
    options: str  # what it adds to the command line of the preset, separated by spaces
    base: str | None = None  # name of the row that it is compared with
    scaled_by: str | None = None  # options of the CGE training whose mean weight multiplies this row's logits

    @property
    def stripes(self) -> int:
        """n; the row stays empty where the feature map has fewer rows."""
        return int(f"{self.options} {STRIPES} 3".partition(f"{STRIPES} ")[2].split()[0])


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper, a part of one, or what stands beside it."""

    title: str
    rows: list[Row]
    precision: bool  # of each M_i, rather than retrieval, is what the paper prints
    seeds: int


def comparison(name: str, options: str = "") -> list[Row]:
    """A method without and with CGE, and the controls.

    Revision multiplies the logits by weights near 0.7: the method's logits are scaled so too, by the mean weight of the
    CGE training and by 0.5, that of classes never seen. The weights' gradient and the memory's contents are taken away
    one at a time.
    """
    cge, with_cge = f"CGE+{name}", f"{WITH} {options}".strip()
    scaled = f"{WITHOUT} {VARIANT} scaled {options}".strip()
    return [
        Row(name, f"{WITHOUT} {options}".strip()),
        Row(cge, with_cge, name),
        Row(f"{name}, logits x 0.5", f"{scaled} {SCALE} 0.5", name),
        Row(f"{name}, logits x mean w", scaled, name, scaled_by=with_cge),
        Row(f"{cge}, detached weights", f"{with_cge} {VARIANT} detached_weights", name),
        Row(f"{cge}, shuffled memory", f"{with_cge} {VARIANT} shuffled_memory", name),
    ]


def table_of(content: dict[str, Any]) -> Table:
    """A table as tables.yaml has it; without rows it is the controls of what it starts from."""
    start, options = content.get("start", "BOT"), content.get("rows", {})
    bases = {f"CGE+{name}": name for name in options}
    rows = [Row(name, f"{own} {STARTS[start]}".strip(), bases.get(name)) for name, own in options.items()]
    rows += [row for name in content.get("baselines", ()) for row in comparison(name, STARTS[name])[:2]]
    rows = rows or comparison(start, STARTS[start])
    return Table(content.get("title", "Controls"), rows, content.get("precision", False), content.get("seeds", 3))


CONTENTS = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text())
TABLES = {key: table_of(content) for key, content in CONTENTS.items()}
OF_RECIPES = "table8"  # which trains nothing
NAMES = sorted({key for key in TABLES if "-" not in key} | {"table1", "table3", "figure5", OF_RECIPES})

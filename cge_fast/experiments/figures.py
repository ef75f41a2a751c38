"""The paper's figures, drawn from the trainings of seed 0."""

from pathlib import Path

from cge_fast.analyze.loss_cdf import loss_cdf
from cge_fast.analyze.saliency import saliency
from cge_fast.analyze.stripes import levels
from cge_fast.analyze.trained import open_checkpoint
from cge_fast.analyze.weights import weights
from cge_fast.experiments.runs import folder_of
from cge_fast.experiments.tables import BOT, CGE, WITH, WITHOUT, Row, loss

TITLES = {
    "figure4": "Levels of difficulty, without and with CGE",
    "figure5": "Distribution of the loss: cross entropy, focal loss and CGE",
    "figure6": "Weights of the revision",
    "figure7": "Saliency of the baseline and of CGE",
}
ROWS = {
    "figure4": [Row("memory not used", f"{WITH} {loss('memory_not_used')}"), Row(CGE, WITH)],
    "figure5": [Row(BOT, WITHOUT), Row("focal", f"{WITHOUT} {loss('focal')}"), Row(CGE, WITH)],
    "figure6": [Row(CGE, WITH)],
    "figure7": [Row(BOT, WITHOUT), Row(CGE, WITH)],
}
ANALYSES = {"figure4": levels, "figure5": loss_cdf, "figure6": weights, "figure7": saliency}


def draw(figure: str, output: Path) -> str:
    """Writes the figure's PNG and CSV below `output`/`figure`; returns what they show in a line, and where they are."""
    opened = [
        open_checkpoint(folder_of(output, row, seed=0) / "checkpoints" / "last", row.name) for row in ROWS[figure]
    ]
    written = ANALYSES[figure](opened, output / figure)
    return f"{written.summary}\n{written.picture} and {written.table}"

"""Training for re-identification with Comprehensive Global Embedding (CGE)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from cge_fast.api import TrainedModel, load  # noqa: F401
    from cge_fast.head import CGEHead  # noqa: F401
    from cge_fast.losses.cge import CGELoss  # noqa: F401
    from cge_fast.losses.softmax import LossOutput, SoftmaxLoss  # noqa: F401
    from cge_fast.model import Embeddings, ReidModel  # noqa: F401

__version__ = "0.2.0"

# Imported when asked for: whoever reads a data set or prints --help waits for neither torch nor Triton.
MODULES = {
    "CGEHead": "cge_fast.head",
    "CGELoss": "cge_fast.losses.cge",
    "Embeddings": "cge_fast.model",
    "LossOutput": "cge_fast.losses.softmax",
    "ReidModel": "cge_fast.model",
    "SoftmaxLoss": "cge_fast.losses.softmax",
    "TrainedModel": "cge_fast.api",
    "load": "cge_fast.api",
}
__all__ = [*MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)

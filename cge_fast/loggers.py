"""Where an epoch's figures go besides a run's folder: Weights & Biases and MLflow, each as its own settings say."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cge_fast import files
from cge_fast.errors import UserError, notice, one_line, take_time_to_end

IDENTITIES = "loggers.json"  # in a run's folder, what each logger calls it, so that a resumed run goes on there


class Logger(NamedTuple):
    """A run that has begun at a logger's."""

    identity: str
    write: Callable[[dict[str, float], int], Any]  # figures by name, and the epoch
    close: Callable[[bool], Any]  # whether the training has failed


def wandb(folder: Path, settings: dict[str, Any], identity: str | None) -> Logger:
    """A run at Weights & Biases, whose environment variables say where: WANDB_PROJECT, WANDB_MODE and so on."""
    import wandb

    run = wandb.init(id=identity, resume="allow", name=folder.name, dir=folder, config=settings)
    return Logger(run.id, lambda figures, epoch: run.log(figures, step=epoch), lambda failed: run.finish(int(failed)))


def mlflow(folder: Path, settings: dict[str, Any], identity: str | None) -> Logger:
    """A run at MLflow, whose environment variables say where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""
    import mlflow

    run = mlflow.start_run(run_id=identity, run_name=folder.name)
    if identity is None:
        for name, value in settings.items():
            section = value if isinstance(value, dict) else {"": value}
            mlflow.log_params({f"{name}.{key}".rstrip("."): setting for key, setting in section.items()})
    return Logger(
        run.info.run_id,
        lambda figures, epoch: mlflow.log_metrics(figures, step=epoch),
        lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    )


LOGGERS = {"wandb": wandb, "mlflow": mlflow}


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError if a logger's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"loggers: {name} is not installed: pip install 'cge-fast[{name}]'")


class Loggers:
    """Several loggers of a run. One that fails, like a network that is down, is named in one line and left alone.

    Args:
        names: of LOGGERS.
        folder: the run's.
        settings: all of the run's, by section and key.
        resuming: go on with the runs that they began for the folder.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: dict[str, Any], resuming: bool):
        self.open: dict[str, Logger] = {}
        file = folder / IDENTITIES
        known = files.read_json(file) if names and resuming and file.exists() else {}
        for name in names:
            begun = self.attempt(name, LOGGERS[name], folder, settings, known.get(name))
            if begun:
                self.open[name], known[name] = begun, begun.identity
        if names:
            files.replace(file, json.dumps(known).encode())

    def attempt(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What the call gives; None, and the logger is left alone from now on, if it fails."""
        try:
            return call(*arguments)
        except Exception as error:  # of whatever kind a network and a package raise
            notice(f"loggers: {name} has failed and is left alone ({type(error).__name__}: {one_line(error)})")
            self.open.pop(name, None)

    def write(self, figures: dict[str, float], epoch: int) -> None:
        """Writes one epoch."""
        for name, logger in list(self.open.items()):
            self.attempt(name, logger.write, figures, epoch)

    def close(self, error: type[BaseException] | None, *_: object) -> None:
        """Ends the runs, as what they are after an error or none."""
        take_time_to_end()  # to send what is left
        for name, logger in list(self.open.items()):
            self.attempt(name, logger.close, error is not None)

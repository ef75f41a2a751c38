"""Weights & Biases and MLflow: what they are given, that a resumed run goes on there, and that they end no training."""

import json
import os
import signal
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
from runs import rows, run

from cge_fast import loop
from cge_fast.log import Log, scalars
from cge_fast.loggers import IDENTITIES


@pytest.fixture
def calls(monkeypatch):
    """Modules that note what is called, in place of the loggers' own."""
    noted = []

    def note(name, result=None):
        def call(*arguments, **options):
            noted.append((name, arguments, options))
            return result

        return call

    wandb, mlflow = ModuleType("wandb"), ModuleType("mlflow")
    begun = SimpleNamespace(id="of-wandb", log=note("wandb.log"), finish=note("wandb.finish"))
    wandb.init = note("wandb.init", begun)
    mlflow.start_run = note("mlflow.start_run", SimpleNamespace(info=SimpleNamespace(run_id="of-mlflow")))
    for name in ("log_params", "log_metrics", "end_run"):
        setattr(mlflow, name, note(f"mlflow.{name}"))
    for module in (wandb, mlflow):
        module.__spec__ = SimpleNamespace()  # what importlib.util.find_spec gives
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return noted


def test_both_are_given_every_epoch_and_the_settings_and_a_resumed_run_goes_on_there(options, tmp_path, capsys, calls):
    assert run([*options, "--loggers", "[wandb, mlflow]"], capsys)[0] == 0
    written = [(name, arguments, taken) for name, arguments, taken in calls if name.endswith(("log", "log_metrics"))]
    for name in ("wandb.log", "mlflow.log_metrics"):
        found = [(arguments[0], taken["step"]) for called, arguments, taken in written if called == name]
        assert found == [(scalars(row), row["epoch"]) for row in rows(tmp_path / "run") if row["epoch"]]
    (started,) = (taken for name, _, taken in calls if name == "wandb.init")
    assert (started["id"], started["name"], started["config"]["optim"]["epochs"]) == (None, "run", 2)
    parameters = {}
    for name, arguments, _ in calls:
        parameters |= arguments[0] if name == "mlflow.log_params" else {}
    assert (parameters["optim.epochs"], parameters["seed"]) == (2, 0)
    ended = [(name, arguments) for name, arguments, _ in calls[-2:]]
    assert ended == [("wandb.finish", (0,)), ("mlflow.end_run", ("FINISHED",))]
    assert json.loads((tmp_path / "run" / IDENTITIES).read_text()) == {"wandb": "of-wandb", "mlflow": "of-mlflow"}

    calls.clear()
    assert run(["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "3"], capsys)[0] == 0
    assert [taken["id"] for name, _, taken in calls if name == "wandb.init"] == ["of-wandb"]
    assert [taken["run_id"] for name, _, taken in calls if name == "mlflow.start_run"] == ["of-mlflow"]
    assert [taken["step"] for name, _, taken in calls if name == "wandb.log"] == [3]


def test_a_signal_leaves_the_loggers_the_time_to_send_what_is_left_and_the_run_is_no_finished_one(
    options, tmp_path, capsys, calls, monkeypatch
):
    finish, train_epoch = sys.modules["wandb"].init().finish, loop.train_epoch

    def slow(code):
        time.sleep(1.5)  # longer than a signal waits before it is repeated
        finish(code)

    def interrupted(run, epoch, *others):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_epoch(run, epoch, *others)

    monkeypatch.setattr(sys.modules["wandb"].init(), "finish", slow)
    monkeypatch.setattr("cge_fast.loop.train_epoch", interrupted)
    closed = []
    monkeypatch.setattr(Log, "close", lambda log, close=Log.close: closed.append(close(log)))
    status, _, err = run([*options, "--loggers", "[wandb, mlflow]"], capsys)
    assert status == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM; the last checkpoint is" in err
    ended = [(name, arguments) for name, arguments, _ in calls[-2:]]
    assert ended == [("wandb.finish", (1,)), ("mlflow.end_run", ("FAILED",))]
    assert [arguments[0]["seconds"] > 0 for name, arguments, _ in calls if name == "wandb.log"] == [True]
    assert closed == [None]


def test_damaged_identities_are_named(trained, capsys, calls):
    (trained / IDENTITIES).write_text('{"wandb": "of-')
    status, _, err = run(["--output", str(trained), "--resume", "--loggers", "[wandb]", "--optim.epochs", "3"], capsys)
    assert status == 2
    assert f"{trained / IDENTITIES} is damaged: it must hold a JSON object" in err


@pytest.mark.parametrize("failing", ["init", "log"])
def test_a_network_that_is_down_is_one_line_and_the_training_goes_on(
    options, tmp_path, capsys, calls, monkeypatch, failing
):
    def down(*arguments, **options):
        raise ConnectionError("no route\nto host")

    begun = SimpleNamespace(id="x", log=down, finish=down)
    monkeypatch.setattr(sys.modules["wandb"], "init", down if failing == "init" else lambda **options: begun)
    status, out, err = run([*options, "--loggers", "[wandb, mlflow]"], capsys)
    assert (status, "mAP" in out) == (0, True)
    said = "loggers: wandb has failed and is left alone (ConnectionError: no route to host)\n"
    assert err.count(said) == err.count("loggers: ") == 1
    assert [name for name, _, _ in calls].count("mlflow.log_metrics") == 2


def test_without_the_package_the_extra_is_named(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run([*options, "--loggers", "[mlflow]"], capsys)
    assert status == 2
    assert "loggers: mlflow is not installed: pip install 'cge-fast[mlflow]'" in err
    assert not (tmp_path / "run").exists()

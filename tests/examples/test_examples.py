"""Each example runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The example as a module; its `main` has not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LightningModule(torch.nn.Module):
    """As much of Lightning's as the example has."""

    current_epoch = 0

    def log(self, name: str, value: torch.Tensor, prog_bar: bool) -> None:
        assert value.isfinite()


class Trainer:
    """Calls the hooks in Lightning's order."""

    def __init__(self, max_epochs: int, logger: bool, enable_checkpointing: bool):
        self.max_epochs = max_epochs

    def fit(self, module: LightningModule, loader: DataLoader) -> None:
        optimizer = module.configure_optimizers()
        for module.current_epoch in range(self.max_epochs):
            for index, batch in enumerate(loader):
                outputs = module.training_step(batch, index)
                optimizer.zero_grad()
                outputs["loss"].backward()
                optimizer.step()
                module.on_train_batch_end(outputs, batch, index)


@pytest.fixture
def lightning(monkeypatch) -> ModuleType:
    """Lightning, or what stands for it where it is not installed."""
    if importlib.util.find_spec("lightning"):
        return importlib.import_module("lightning")
    stand_in = ModuleType("lightning")
    stand_in.LightningModule, stand_in.Trainer = LightningModule, Trainer
    monkeypatch.setitem(sys.modules, "lightning", stand_in)
    return stand_in


def test_every_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"own_loop", "lightning_module", "finetune_folder"}


@pytest.mark.slow
def test_own_loop(capsys):
    example("own_loop").main()
    assert "embedding (16, 512)" in capsys.readouterr().out


@pytest.mark.slow
def test_lightning_module(lightning, monkeypatch):
    module = example("lightning_module")
    fitted = []
    fit = lightning.Trainer.fit
    monkeypatch.setattr(
        lightning.Trainer, "fit", lambda self, model, data: (fitted.append(model), fit(self, model, data))
    )
    module.main()
    (trained,) = fitted
    memory = trained.head.loss.memory
    assert torch.allclose(memory.norm(dim=2), torch.ones(3, 8))
    trained.eval()
    assert trained(torch.rand(2, 3, 128, 64)).shape == (2, 512)


@pytest.mark.slow
def test_finetune_folder(options, shared_crops, tmp_path):
    from cge_fast import train

    train.main(options)
    checkpoint = tmp_path / "run" / "checkpoints" / "last"
    output = tmp_path / "tuned"
    example("finetune_folder").main([str(checkpoint), str(shared_crops), str(output), "--optim.epochs", "1"])
    (row,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert row["mAP"] > 0.5

"""Each example runs, and trains as the plain loop of the README does."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import WITHOUT_GPU, on_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from cge_fast import CGEHead, CGELoss, ReidModel

EXAMPLES = Path(__file__).parents[2] / "examples"
IDENTITIES, EPOCHS, LR = 4, 4, 3.5e-4
MISSING = "needs pip install -e '.[examples]'"


def example(name: str) -> ModuleType:
    """The example as a module; its `main` has not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def people() -> TensorDataset:
    """Six noisy images of each identity, which is a colour."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(6 * IDENTITIES) % IDENTITIES
    colours = torch.rand(IDENTITIES, 3, 1, 1, generator=random)[labels]
    return TensorDataset(colours + 0.1 * torch.randn(len(labels), 3, 12, 8, generator=random), labels)


def backbone_and_head() -> tuple[nn.Sequential, CGEHead]:
    """A map of 6 rows and 8 channels, and what goes on top of it."""
    torch.manual_seed(1)
    first, second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second), CGEHead(8, IDENTITIES)


def train_plainly(modules, loss_and_stripes, write_memory, batches) -> None:
    """The loop that every example has in its own way."""
    optimizer = torch.optim.Adam([parameter for module in modules for parameter in module.parameters()], LR)
    for epoch in range(1, EPOCHS + 1):
        for images, labels in batches:
            loss, stripes = loss_and_stripes(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            write_memory(stripes, labels, epoch / EPOCHS)


def plain_loop(backbone, head, batches) -> None:
    def loss_and_stripes(images, labels):
        out = head(backbone(images), labels)
        return out.loss, out.stripes

    write_memory = getattr(head, "module", head).write_memory
    train_plainly([backbone, head], loss_and_stripes, write_memory, batches)


def tensors(*modules) -> list[torch.Tensor]:
    return [tensor for module in modules for tensor in module.state_dict().values()]


@torch.no_grad()
def loss_of_all(backbone, head) -> float:
    images, labels = people().tensors
    return head.eval()(backbone.eval()(images), labels).loss.item()


def assert_trained(backbone, head) -> None:
    """The loss has fallen, and every identity is in the memory."""
    assert loss_of_all(backbone, head) < loss_of_all(*backbone_and_head())
    torch.testing.assert_close(head.loss.memory.norm(dim=2), torch.ones(3, IDENTITIES))


@pytest.fixture
def batches() -> DataLoader:
    return DataLoader(people(), batch_size=8)


@pytest.fixture
def plain(batches) -> tuple[nn.Module, CGEHead]:
    """Backbone and head, trained by the plain loop."""
    backbone, head = backbone_and_head()
    plain_loop(backbone, head, batches)
    return backbone, head


def test_every_example_is_tested():
    assert all(f"test_{file.stem}" in globals() for file in EXAMPLES.glob("*.py"))


def test_the_plain_loop_trains(plain):
    assert_trained(*plain)


def test_accelerate_loop(batches, plain, monkeypatch):
    pytest.importorskip("accelerate", reason=MISSING)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    backbone, head = backbone_and_head()
    example("accelerate_loop").train(backbone, head, batches, EPOCHS)
    assert all(map(torch.equal, tensors(backbone, head), tensors(*plain)))
    assert_trained(backbone, head)


@pytest.mark.slow
def test_lightning_module(batches, plain):
    lightning = pytest.importorskip("lightning", reason=MISSING)
    module = example("lightning_module").CGEModule(*backbone_and_head())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", **quiet).fit(module, batches)
    assert all(map(torch.equal, tensors(module.backbone, module.head), tensors(*plain)))
    assert_trained(module.backbone, module.head)
    assert module(people().tensors[0]).shape == (24, 8)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loop(batches, plain, backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    backbone, head = backbone_and_head()
    example("compiled_loop").train(backbone, head, batches, EPOCHS)
    for compiled, eager in zip(backbone.parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(head.loss.memory, plain[1].loss.memory)
    assert_trained(backbone, head)


@pytest.mark.usefixtures("without_gpu")  # where its trainer would put the images
def test_metric_learning_trainer(batches, monkeypatch):
    module = example("metric_learning_trainer")
    monkeypatch.setattr(module, "BATCH", 8)
    torch.manual_seed(1)
    model, cge = ReidModel(backbone_and_head()[0], channels=8), CGELoss(8, IDENTITIES)
    plain_model, plain_cge = copy.deepcopy((model, cge))
    untrained = copy.deepcopy((model, cge))
    module.train(model, cge, people(), EPOCHS, torch.utils.data.SequentialSampler(people()))

    def loss_and_stripes(images, labels):
        embeddings = plain_model(images)
        pairs = hardest(embeddings.pooled, labels)
        return plain_cge(embeddings, labels).loss + triplet(embeddings.pooled, labels, pairs), embeddings.stripes

    hardest, triplet = module.miners.BatchHardMiner(), module.losses.TripletMarginLoss(margin=0.3)
    train_plainly([plain_model, plain_cge], loss_and_stripes, plain_cge.write_memory, batches)
    assert all(map(torch.equal, tensors(model, cge), tensors(plain_model, plain_cge)))

    def loss(model, cge):
        images, labels = people().tensors
        return cge(model.eval()(images), labels).loss.item()

    assert loss(model, cge) < loss(*untrained)


def replicated(rank: int) -> tuple[nn.Module, CGEHead]:
    """Backbone and head, trained by the plain loop in DistributedDataParallel, every second batch on each rank."""
    backbone, head = backbone_and_head()
    wrapped = [DistributedDataParallel(module, broadcast_buffers=False) for module in (backbone, head)]
    plain_loop(*wrapped, [*DataLoader(people(), batch_size=4)][rank::2])
    return backbone, head


def sharded_as_replicated(rank: int) -> None:
    backbone, head = backbone_and_head()
    example("fsdp_backbone").train(backbone, head, [*DataLoader(people(), batch_size=4)][rank::2], EPOCHS)
    expected_backbone, expected_head = replicated(rank)
    assert isinstance(backbone[0], FSDPModule)
    for parameter, expected in zip(backbone.parameters(), expected_backbone.parameters(), strict=True):
        assert parameter.to_local().numel() == expected.numel() / 2
        torch.testing.assert_close(parameter.full_tensor(), expected)
    torch.testing.assert_close(tensors(head), tensors(expected_head))
    torch.testing.assert_close(head.loss.memory.norm(dim=2), torch.ones(3, IDENTITIES))


def accelerated_as_replicated(rank: int) -> None:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # they have met already
    os.environ |= ranks | {"MASTER_ADDR": "none", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    backbone, head = backbone_and_head()
    example("accelerate_loop").train(backbone, head, DataLoader(people(), batch_size=4), EPOCHS)
    torch.testing.assert_close(tensors(backbone, head), tensors(*replicated(rank)))


@pytest.mark.slow
def test_fsdp_backbone(tmp_path):
    on_ranks(2, sharded_as_replicated, folder=tmp_path)


@pytest.mark.slow
def test_accelerate_loop_on_two_ranks(tmp_path):
    pytest.importorskip("accelerate", reason=MISSING)
    on_ranks(2, accelerated_as_replicated, folder=tmp_path)


@pytest.mark.slow
def test_own_loop(capsys):
    example("own_loop").main()
    assert "embedding (16, 512)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("name", ["accelerate_loop", "compiled_loop", "lightning_module", "metric_learning_trainer"])
def test_an_example_runs_as_it_is(name, monkeypatch):
    if needed := {"accelerate_loop": "accelerate", "lightning_module": "lightning"}.get(name):
        pytest.importorskip(needed, reason=MISSING)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    example(name).main()


@pytest.mark.slow
def test_the_sharded_example_runs_as_it_is():
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command, environment = [*program, EXAMPLES / "fsdp_backbone.py"], os.environ | WITHOUT_GPU
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "120 tensors of the backbone to save\n", done.stderr


@pytest.mark.slow
def test_finetune_folder(options, shared_crops, tmp_path):
    from cge_fast import train

    train.main(options)
    checkpoint = tmp_path / "run" / "checkpoints" / "last"
    output = tmp_path / "tuned"
    example("finetune_folder").main([str(checkpoint), str(shared_crops), str(output), "--optim.epochs", "1"])
    (row,) = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert row["mAP"] > 0.5

"""How a training learns: a backbone with a rate of its own, or frozen at first; when it stops early."""

import pytest
import torch
from runs import assert_same_weights, killed_in_epoch, rows, run, weights

from cge_fast import backbones, loop
from cge_fast.optimizer import parameter_groups
from cge_fast.options import OptimConfig

pytestmark = pytest.mark.usefixtures("same_bits")


@pytest.mark.parametrize("kind", ["cge", "baseline"])
def test_a_frozen_backbone_stays_as_it_was_and_then_learns_bit_for_bit_also_after_a_kill(
    kind, options, tmp_path, capsys, monkeypatch
):
    options = [*options, "--model.cge", str(kind == "cge").lower(), "--evaluation.untrained", "false"]
    start = backbones.build("compact")
    torch.save(start.state_dict(), tmp_path / "start.pth")
    options += ["--model.weights", str(tmp_path / "start.pth"), "--optim.epochs", "3", "--optim.freeze_backbone", "2"]
    killed_in_epoch(3, options, monkeypatch)
    state = weights(tmp_path / "run")
    for name, tensor in start.state_dict().items():
        assert torch.equal(state[f"backbone.{name}"], tensor), f"{name}, a statistic or a parameter"
    assert not torch.equal(state["neck.running_mean"], torch.zeros_like(state["neck.running_mean"])), "the rest learns"
    assert run(["--output", str(tmp_path / "run"), "--resume"], capsys)[0] == 0
    assert run([*options, "--output", str(tmp_path / "whole")], capsys)[0] == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    after = weights(tmp_path / "run")
    learnt = [name for name in start.state_dict() if name.endswith(("weight", "running_mean"))]
    assert all(not torch.equal(after[f"backbone.{name}"], state[f"backbone.{name}"]) for name in learnt)


def test_the_backbones_rate_is_a_factor_of_the_others(options, tmp_path, capsys):
    torch.save(backbones.build("compact").state_dict(), tmp_path / "start.pth")
    one_step = [*options, "--optim.epochs", "1", "--optim.schedule", "cosine", "--optim.lr", "0.001"]
    one_step += ["--data.identities", "4", "--data.instances", "6", "--optim.warmup", "0", "--optim.weight_decay", "0"]
    one_step += ["--model.weights", str(tmp_path / "start.pth"), "--evaluation.untrained", "false"]
    for factor in ("1", "0.25"):
        assert run([*one_step, "--optim.backbone_lr", factor, "--output", str(tmp_path / factor)], capsys)[0] == 0
    start = {f"backbone.{name}": tensor for name, tensor in torch.load(tmp_path / "start.pth").items()}
    same, quarter = weights(tmp_path / "1"), weights(tmp_path / "0.25")
    for name in (name for name, _ in backbones.build("compact").named_parameters()):
        moved, less = (found[f"backbone.{name}"] - start[f"backbone.{name}"] for found in (same, quarter))
        torch.testing.assert_close(less, moved / 4, rtol=1e-2, atol=1e-7)
    assert torch.equal(same["neck.weight"], quarter["neck.weight"])
    assert rows(tmp_path / "0.25")[-1]["lr"] == 0.001, "what is logged is the others'"


@pytest.mark.parametrize("name", ["compact", "resnet18", "timm:test_vit", "timm:test_efficientnet"])
def test_layers_learn_at_a_share_of_the_next_ones_rate_from_the_input_on(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    backbone, head = backbones.build(name), torch.nn.Linear(2, 2)
    groups = parameter_groups(OptimConfig(backbone_lr=0.5, layer_decay=0.8), backbone, backbone, head)
    every = [*backbone.parameters(), *head.parameters()]
    found = [parameter for group in groups for parameter in group["params"]]
    assert [id(parameter) for parameter in found] == [id(parameter) for parameter in every], "in their order"
    factors = [group["factor"] for group in groups]
    assert factors == sorted(factors)
    layers = len(groups) - 1
    assert layers > 3
    assert factors == pytest.approx([0.5 * 0.8 ** (layers - 1 - depth) for depth in range(layers)] + [1.0])
    assert [group["factor"] for group in parameter_groups(OptimConfig(), backbone, backbone, head)] == [1.0]


def test_a_run_whose_layers_have_rates_of_their_own_is_resumed_bit_for_bit(options, tmp_path, capsys, monkeypatch):
    options = [*options, "--optim.epochs", "2", "--optim.layer_decay", "0.5", "--evaluation.untrained", "false"]
    killed_in_epoch(2, options, monkeypatch)
    assert run(["--output", str(tmp_path / "run"), "--resume"], capsys)[0] == 0
    assert run([*options, "--output", str(tmp_path / "whole")], capsys)[0] == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_training_ends_early_and_a_resumed_one_at_once_unless_it_may_go_on(options, tmp_path, capsys, monkeypatch):
    found = iter([0.5, 0.4, 0.5, 0.6, 0.1, 0.1, 0.1])
    monkeypatch.setattr("cge_fast.loop.evaluation", lambda run: dict.fromkeys(loop.RETRIEVAL, next(found)))
    options = [*options, "--evaluation.untrained", "false", "--evaluation.every", "1", "--optim.epochs", "9"]
    assert run([*options, "--optim.patience", "2"], capsys)[0] == 0
    assert [row["mAP"] for row in rows(tmp_path / "run")] == [0.5, 0.4, 0.5], "as good is not better"
    status, out, err = run(["--output", str(tmp_path / "run"), "--resume"], capsys)
    assert (status, "mAP 50.0%" in out) == (0, True)
    assert "optim.patience: ends after epoch 3, best mAP 50.0%" in err
    assert run(["--output", str(tmp_path / "run"), "--resume", "--optim.patience", "3"], capsys)[0] == 0
    assert len(rows(tmp_path / "run")) == 7

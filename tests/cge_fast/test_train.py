"""The training program, from its command line to its last line."""

import json
import math
import shutil
import time
from collections import Counter
from datetime import datetime
from typing import get_args

import pytest
import torch
from runs import assert_same_weights, rows, run, weights

import cge_fast.losses.cge
import cge_reference
from cge_fast import checkpoint, errors, evaluate, loop, train
from cge_fast.build import build_run
from cge_fast.losses.softmax import SoftmaxLoss
from cge_fast.options import Backend
from cge_fast.profile import TRACE


@pytest.mark.parametrize("cge", ["true", "false"])
def test_a_run_ends_with_its_figures_and_a_checkpoint_that_evaluates_to_them(options, tmp_path, capsys, cge):
    status, out, _ = run([*options, "--model.cge", cge], capsys)
    assert status == 0
    last = tmp_path / "run" / "checkpoints" / "last"
    line = out.strip().splitlines()[-1]
    assert line.startswith("mAP ")
    assert "rank-1" in line
    assert "untrained: mAP" in line
    assert line.endswith(f"checkpoint {last}")
    evaluate.main(["--checkpoint", str(last)])
    assert capsys.readouterr().out.split(",")[0] == line.split(",")[0]


def test_metrics_have_a_row_for_each_epoch(options, tmp_path, capsys):
    run([*options, "--evaluation.every", "0"], capsys)
    untrained, first, last = rows(tmp_path / "run")
    assert [untrained["epoch"], first["epoch"], last["epoch"]] == [0, 1, 2]
    assert first["mAP"] is None
    assert last["mAP"] > 0
    assert first["loss"] == pytest.approx(first["classification"] + first["metric"])
    assert [first["momentum"], last["momentum"]] == [0.5, 1.0]
    assert len(last["stripe_precision"]) == 3
    assert len(last["num_stripes_correct"]) == 4
    assert sum(last["num_stripes_correct"]) == pytest.approx(1)
    by_number = sum(share * number for number, share in enumerate(last["num_stripes_correct"]))
    assert by_number == pytest.approx(sum(last["stripe_precision"])), "they count the stripes that are correct"
    assert {"train_accuracy", "lr", "rank1", "rank5", "rank10", "mINP", "seconds", "images_per_second"} <= last.keys()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.slow
@pytest.mark.usefixtures("same_bits")
def test_two_runs_with_one_seed_are_equal_whatever_the_number_of_workers(options, tmp_path, capsys):
    run(options, capsys)
    run([*options, "--output", str(tmp_path / "other"), "--data.workers", "2"], capsys)
    assert_same_weights(tmp_path / "run", tmp_path / "other")
    run([*options, "--output", str(tmp_path / "seed"), "--seed", "1"], capsys)
    assert not torch.equal(weights(tmp_path / "run")[checkpoint.MEMORY], weights(tmp_path / "seed")[checkpoint.MEMORY])


@pytest.mark.parametrize(("backend", "reference"), [("auto", 0), ("cpu", 0), ("reference", 6)])
def test_the_backend_says_which_operators_run(options, tmp_path, capsys, monkeypatch, backend, reference):
    assert backend in get_args(Backend)
    calls = Counter()

    def count(name):
        operator = getattr(cge_reference, name)

        def counted(*arguments, **keywords):
            calls[name] += 1
            return operator(*arguments, **keywords)

        monkeypatch.setattr(cge_reference, name, counted)

    for name in ("revised_cross_entropy", "write_memory_", "stripe_pool"):
        count(name)
    status, out, _ = run([*options, "--backend", backend], capsys)
    assert status == 0
    assert out.startswith("mAP ")
    assert calls["revised_cross_entropy"] == calls["write_memory_"] == reference, "two epochs of three steps"
    assert (calls["stripe_pool"] > reference) == (backend == "reference")
    last = rows(tmp_path / "run")[-1]
    assert sum(share * number for number, share in enumerate(last["num_stripes_correct"])) == pytest.approx(
        sum(last["stripe_precision"])
    )
    calls.clear()
    evaluate.main(["--checkpoint", str(tmp_path / "run" / "checkpoints" / "last")])
    assert bool(calls["stripe_pool"]) == (backend == "reference"), "evaluation's is the checkpoint's"


class Killed(BaseException):
    """What a kill signal would do."""


@pytest.mark.usefixtures("same_bits")
@pytest.mark.parametrize(
    "more",
    [
        "",
        "--optim.optimizer sgd --optim.lr 0.01 --optim.ema 0.5",
        "--optim.optimizer adamw --optim.clip 1 --data.cache ram",
    ],
)
def test_a_run_killed_after_an_epoch_resumes_bit_for_bit(options, tmp_path, capsys, monkeypatch, more):
    options = [*options, "--optim.epochs", "3", *more.split()]
    run([*options, "--output", str(tmp_path / "whole")], capsys)
    save = loop.save

    def save_then_die(run, is_best):
        if run.epochs_done == 2:
            raise Killed  # the row of metrics.jsonl is written, the checkpoint is not
        save(run, is_best)

    monkeypatch.setattr(loop, "save", save_then_die)
    with pytest.raises(Killed):
        run(options, capsys)
    monkeypatch.undo()
    status, out, _ = run(["--output", str(tmp_path / "run"), "--resume"], capsys)
    assert status == 0
    assert "mAP" in out
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    one, other = (checkpoint.load_training(tmp_path / name / "checkpoints" / "last") for name in ("run", "whole"))
    for name, tensor in (one["model"] or {}).items():
        assert torch.equal(tensor, other["model"][name]), name
    for parameter, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][parameter][name])
    timed = {"seconds", "images_per_second"}
    strip = lambda found: [{key: row[key] for key in row.keys() - timed} for row in found]  # noqa: E731
    assert strip(rows(tmp_path / "run")) == strip(rows(tmp_path / "whole"))


def test_micro_batches_cover_the_batch_and_write_the_memory_once(options, tmp_path, capsys, monkeypatch):
    writes = []
    monkeypatch.setattr(cge_fast.losses.cge, "write_memory_", lambda *arguments, shard: writes.append(arguments))
    status, _, _ = run([*options, "--optim.accumulate", "2"], capsys)
    assert status == 0
    assert [len(labels) for _, _, labels, *_ in writes] == [8] * 6, "two epochs of three steps, the whole batch each"
    assert rows(tmp_path / "run")[1]["train_accuracy"] <= 1


@pytest.mark.parametrize("momentum", ["linear", "exponential"])
def test_one_epoch_in_all_trains_with_a_momentum_of_one(options, tmp_path, capsys, momentum):
    run([*options, "--optim.epochs", "1", "--model.memory_momentum", momentum], capsys)
    assert rows(tmp_path / "run")[-1]["momentum"] == 1
    torch.testing.assert_close(weights(tmp_path / "run")[checkpoint.MEMORY].norm(dim=2), torch.ones(3, 4))


def test_more_instances_than_an_identity_has_images(options, capsys):
    assert run([*options, "--data.identities", "2", "--data.instances", "8"], capsys)[0] == 0


@pytest.mark.slow
def test_profile_prints_the_share_that_is_not_the_backbone_and_writes_a_trace(options, tmp_path, capsys, monkeypatch):
    def evaluated_slowly(*arguments):
        time.sleep(1)
        return evaluation(*arguments)

    evaluation = loop.evaluation
    monkeypatch.setattr(loop, "evaluation", evaluated_slowly)
    _, out, _ = run([*options, "--profile", "--evaluation.every", "1"], capsys)
    lines = [line for line in out.splitlines() if line.endswith("%")]
    parts = {line[:28].strip(): float(line.split()[-1].rstrip("%")) for line in lines}
    of_a_step = ["waiting for data", "augmentation", "backbone forward", "head forward and losses", "head backward"]
    of_a_step += ["backbone backward", "optimizer", "memory write", "bookkeeping"]
    assert [*parts] == [*of_a_step, "all but the backbone"]
    rest = parts.pop("all but the backbone")
    assert sum(parts.values()) == pytest.approx(100, abs=0.6)
    assert rest == pytest.approx(100 - parts["backbone forward"] - parts["backbone backward"], abs=0.3)
    assert all(parts[name] > 0 for name in ("backbone forward", "head backward", "backbone backward", "memory write"))
    seconds = {line[:28].strip(): float(line.split()[-3]) for line in lines}
    assert seconds["bookkeeping"] + seconds["waiting for data"] < 1, "evaluation is left out"
    events = json.loads((tmp_path / "run" / TRACE).read_text())["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")  # the host's
    assert names["forward"] == 2, "the first of three steps is left out"


def test_bfloat16_trains(options, tmp_path, capsys):
    status, _, _ = run([*options, "--optim.precision", "bfloat16"], capsys)
    assert status == 0
    assert all(row["classification"] > 0 for row in rows(tmp_path / "run")[1:])
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize(("asked", "native", "copied"), [("bfloat16", False, True), ("auto", True, False)])
def test_the_memory_has_a_low_precision_copy_where_it_is_asked_for(options, monkeypatch, asked, native, copied):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    config, _, _ = train.parse([*options, "--optim.precision", asked])
    made = build_run(config, torch.device("cpu"))
    assert made.model.precision == torch.bfloat16
    assert made.criterion.classification.memory_read.dtype == (torch.bfloat16 if copied else torch.float32)


def test_a_finished_run_is_not_overwritten(trained, options, tmp_path, capsys):
    before = weights(tmp_path / "run")
    status, _, err = run(options, capsys)
    assert status == 2
    assert "holds a run already; continue it with --resume" in err
    assert torch.equal(weights(tmp_path / "run")[checkpoint.MEMORY], before[checkpoint.MEMORY])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_training_image_is_named(options, market, capsys, workers):
    broken = next((market / "bounding_box_train").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    status, _, err = run([*options, "--data.workers", workers], capsys)
    assert status == 2
    message = err.strip().splitlines()[-1]
    assert message.startswith(f"cge_fast.train: error: image {broken} cannot be read (")
    assert "with --data.skip_corrupt true)" in message


def test_corrupt_images_are_left_out_on_request(options, market, capsys):
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        next((market / folder).iterdir()).write_bytes(b"")
    status, _, err = run([*options, "--data.skip_corrupt", "true"], capsys)
    assert status == 0
    assert "left out 3 corrupt images" in err


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(trained, tmp_path, capsys, monkeypatch):
    before = weights(tmp_path / "run")
    monkeypatch.setattr(loop, "learning_rate", lambda *arguments: 1e30)
    more = ["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "4"]
    status, _, err = run(more, capsys)
    assert status == 2
    message = err.strip().splitlines()[-1]
    assert "epoch 3 is not finite" in message
    assert f"the last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'last'}, of epoch 2" in message
    assert message.endswith(f"python -m cge_fast.train --output {tmp_path / 'run'} --resume goes on from there")
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_runs_without_a_folder_do_not_share_one(tmp_path, monkeypatch):
    class Stopped:
        @staticmethod
        def now():
            return datetime(2026, 1, 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "datetime", Stopped)
    assert len({train.new_folder() for _ in range(3)}) == 3


def test_a_relative_root_is_found_from_another_folder(options, market, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(market.parent)
    assert run([*options, "--data.root", market.name], capsys)[0] == 0
    monkeypatch.chdir("/")
    evaluate.main(["--checkpoint", str(tmp_path / "run")])


def test_an_evaluation_that_fails_keeps_the_epoch_and_can_be_repeated(options, market, tmp_path, capsys):
    query = next((market / "query").iterdir())
    content = query.read_bytes()
    query.write_bytes(b"")
    status, _, err = run([*options, "--evaluation.untrained", "false", "--evaluation.every", "0"], capsys)
    assert status == 2
    assert "cannot be read" in err
    assert checkpoint.load_training(tmp_path / "run" / "checkpoints" / "last")["epoch"] == 2
    query.write_bytes(content)
    status, out, _ = run(["--output", str(tmp_path / "run"), "--resume"], capsys)
    assert status == 0
    assert out.startswith("mAP")


def test_the_untrained_network_is_the_floor(options, tmp_path, capsys):
    run([*options, "--evaluation.untrained", "false"], capsys)
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run"))


class Doubled(SoftmaxLoss):
    """A loss of one's own."""

    def __init__(self, *arguments, factor, **keywords):
        super().__init__(*arguments, **keywords)
        self.factor = factor

    def forward(self, embeddings, labels):
        out = super().forward(embeddings, labels)
        return out._replace(loss=self.factor * out.loss)


def test_a_loss_of_ones_own_trains_resumes_and_is_deployed_without_it(options, tmp_path, capsys):
    own = [*options, "--model.cge", "false", "--loss.variant", "doubled", "--loss.variant_args.factor", "2"]
    train.main(own, variants={"doubled": Doubled})
    resumed = ["--output", str(tmp_path / "run"), "--resume", "--optim.epochs", "3"]
    train.main(resumed, variants={"doubled": Doubled})
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    assert rows(tmp_path / "run")[-1]["momentum"] is None
    evaluate.main(["--checkpoint", str(tmp_path / "run" / "checkpoints" / "last")])
    assert capsys.readouterr().out.count("mAP") > 3
    with pytest.raises(errors.UserError, match=r"loss\.variant_args: .*'factor'"):
        train.main([*own[:-2], "--output", str(tmp_path / "other")], variants={"doubled": Doubled})


@pytest.mark.parametrize("layout", ["one camera", "train alone"])
def test_a_set_that_cannot_be_evaluated_is_trained_on_all_the_same(options, market, tmp_path, capsys, layout):
    for split in ("query", "bounding_box_test"):
        if layout == "train alone":
            shutil.rmtree(market / split)
        else:
            for path in (market / split).iterdir():
                path.rename(path.with_name(path.name.replace("_c2", "_c1").replace("_c3", "_c1")))
    status, out, err = run([*options, "--optim.epochs", "1"], capsys)
    assert status == 0
    assert out == f"trained, not evaluated; checkpoint {tmp_path / 'run' / 'checkpoints' / 'last'}\n"
    why = "no query's identity from another camera" if layout == "one camera" else "no images of query and gallery"
    (line,) = [line for line in err.splitlines() if line.startswith("trains without evaluation: ")]
    assert why in line
    assert "cge_fast.evaluate --data.root" in line
    assert [row["mAP"] for row in rows(tmp_path / "run")] == [None]

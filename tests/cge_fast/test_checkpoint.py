"""Checkpoints: whole, replaced atomically, loadable after a kill at any moment."""

import os
import sys

import pytest
import torch
from torch import nn

from cge_fast import checkpoint
from cge_fast.distributed import Shard
from cge_fast.errors import UserError
from cge_fast.loop import holds_run

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.link"}


def model(value: float) -> nn.Module:
    made = nn.Linear(2, 2)
    nn.init.constant_(made.weight, value)
    made.register_buffer("memory", torch.full((3,), value))
    return made


def save(folder, epoch, best=True):
    return checkpoint.save(folder, model(float(epoch)).state_dict(), {"epoch": epoch}, f"seed: {epoch}\n", epoch, best)


def loaded_epochs(folder) -> dict[str, int]:
    """Which epoch each pointer's checkpoint is of; every file of it must agree."""
    epochs = {}
    for pointer in ("last", "best"):
        if (folder / pointer).exists():
            epoch = checkpoint.load_training(folder / pointer)["epoch"]
            assert (checkpoint.load_weights(folder / pointer)["weight"] == epoch).all()
            assert (checkpoint.load_weights(folder / pointer)["memory"] == epoch).all()
            assert checkpoint.config_file(folder / pointer).read_text() == f"seed: {epoch}\n"
            epochs[pointer] = epoch
    return epochs


def test_pointers_name_the_last_and_the_best_and_nothing_else_is_kept(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3, best=False)
    save(tmp_path, 4, best=False)
    assert loaded_epochs(tmp_path) == {"last": 4, "best": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "epoch_0002", "epoch_0004", "last"]


def test_an_epoch_saved_twice_does_not_disturb_the_first(tmp_path):
    first = save(tmp_path, 1)
    second = save(tmp_path, 1, best=False)
    assert first != second
    assert loaded_epochs(tmp_path) == {"last": 1, "best": 1}


def class_rows(value: float) -> dict[str, torch.Tensor]:
    classifier, memory = torch.full((5, 2), value), torch.full((3, 5, 2), value)
    return {checkpoint.CLASSIFIER: classifier, checkpoint.MEMORY: memory}


def save_whole(folder, epoch, best=True):
    checkpoint.save(folder, class_rows(float(epoch)), {"epoch": epoch}, "", epoch, best)


def save_sharded(folder, epoch, best=True):
    rows = class_rows(float(epoch))
    for shard in (Shard(0, 3, 5), Shard(3, 2, 5)):  # the ranks of a run write them at the same time
        of_shard = {
            name: rows[name].narrow(axis, shard.first, shard.count) for name, axis in checkpoint.SHARDED.items()
        }
        if shard.first == 0:
            checkpoint.stage_rows(folder, of_shard, shard)
        else:
            checkpoint.write_rows(folder, of_shard, shard)
    checkpoint.save(folder, {}, {"epoch": epoch}, "", epoch, best, staged_rows=True)


def save_and_die(folder, epoch, best, operation, save=save) -> bool:
    """In a child process: saves, and exits just before file operation number `operation`. True if it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event, arguments):
            nonlocal count
            if event in FILE_OPERATIONS and str(folder) in str(arguments[0]):
                if count == operation:
                    os._exit(9)
                count += 1

        sys.addaudithook(audit)
        save(folder, epoch, best)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("best", [True, False])
def test_a_kill_between_any_two_file_operations_leaves_loadable_checkpoints(tmp_path, best):
    operation, died, seen = 0, True, set()
    while died:
        folder = tmp_path / str(operation)
        save(folder, 1)
        save(folder, 2, best=False)
        died = save_and_die(folder, 3, best, operation)
        epochs = loaded_epochs(folder)
        assert epochs["last"] in (2, 3)
        assert epochs["best"] in ((1, 3) if best else (1,))
        seen.add((epochs["last"], epochs["best"]))
        save(folder, 4)
        assert loaded_epochs(folder) == {"last": 4, "best": 4}
        assert sorted(path.name for path in folder.iterdir()) == ["best", "epoch_0004", "last"], "no leftovers"
        operation += 1
    assert operation > 10, "the hook must have seen the file operations"
    assert len(seen) == (3 if best else 2), "kills before, between and after the pointers' renames"


def test_a_kill_during_the_first_save_leaves_no_checkpoint_or_a_whole_one(tmp_path):
    operation, died = 0, True
    while died:
        folder = tmp_path / str(operation)
        died = save_and_die(folder / "checkpoints", 1, True, operation)
        epochs = loaded_epochs(folder / "checkpoints")
        assert set(epochs.values()) <= {1}
        assert holds_run(folder) == ("last" in epochs), "what can be resumed is, anything else can be begun anew"
        save(folder / "checkpoints", 1)
        assert loaded_epochs(folder / "checkpoints") == {"last": 1, "best": 1}
        assert len(list((folder / "checkpoints").iterdir())) == 3, "no leftovers"
        operation += 1


@pytest.mark.parametrize("save_next", [save_whole, save_sharded])
def test_a_kill_in_a_sharded_save_leaves_no_rows_to_the_next_checkpoint(tmp_path, save_next):
    operation, died = 0, True
    while died:
        folder = tmp_path / str(operation)
        save_whole(folder, 1)
        died = save_and_die(folder, 2, True, operation, save_sharded)
        for epoch in (checkpoint.load_training(folder / "last")["epoch"], 3):
            if epoch == 3:
                save_next(folder, epoch)
            for name, rows in checkpoint.load_weights(folder / "last").items():
                assert rows.equal(class_rows(float(epoch))[name]), name
        assert sorted(path.name for path in folder.iterdir()) == ["best", "epoch_0003", "last"], "no leftovers"
        operation += 1
    assert operation > 12, "the hook must have seen the file operations, the rows' among them"


def test_a_sharded_checkpoint_without_one_of_its_files_is_refused(tmp_path):
    for number, missing in enumerate(("0 to 2", "3 to 4")):
        folder = tmp_path / str(number)
        save_sharded(folder, 1)
        sorted(folder.glob("last/classes-*"))[number].unlink()
        with pytest.raises(UserError, match=f"has no file with the rows of classes {missing}"):
            checkpoint.load_weights(folder / "last")


def test_a_damaged_file_of_rows_is_named(tmp_path):
    save_sharded(tmp_path, 1)
    damaged = sorted(tmp_path.glob("last/classes-*"))[1]
    damaged.write_bytes(b"x")
    with pytest.raises(UserError, match=f"{damaged.name} cannot be read"):
        checkpoint.load_weights(tmp_path / "last")


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no file model.safetensors"):
        checkpoint.load_weights(tmp_path)
    folder = save(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        checkpoint.load_weights(folder)
    (folder / "training.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"training.pt cannot be read"):
        checkpoint.load_training(folder)


def test_the_training_state_holds_no_code(tmp_path):
    with pytest.raises(UserError, match=r"training.pt cannot be read"):
        checkpoint.load_training(checkpoint.save(tmp_path, model(0.0).state_dict(), {"epoch": print}, "", 1, True))

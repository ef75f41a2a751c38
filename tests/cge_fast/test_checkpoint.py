"""Checkpoints: whole, replaced atomically, loadable after a kill at any moment."""

import errno
import os
import shutil
import sys

import pytest
import torch
from support import on_ranks

from cge_fast import checkpoint, files
from cge_fast.checkpoint import Contents
from cge_fast.errors import UserError
from cge_fast.loop import holds_run
from cge_kernels import ClassShard

FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.link"}


def model(value: float) -> dict[str, torch.Tensor]:
    return {"neck.weight": torch.full((2,), value)}


def loss(value: float) -> dict[str, torch.Tensor]:
    return {checkpoint.CLASSIFIER: torch.full((5, 2), value), checkpoint.MEMORY: torch.full((3, 5, 2), value)}


def save(folder, epoch, best=True):
    contents = Contents(5, model(float(epoch)), loss(float(epoch)), {"epoch": epoch})
    checkpoint.save(folder, contents, f"seed: {epoch}\n", epoch, best)
    return folder / "last"


def test_names_are_kept_and_checked_and_may_be_absent(tmp_path):
    names = {"identities": ["anna", "", "Bert Ö"], "cameras": ["north"]}
    contents = Contents(5, model(1.0), loss(1.0), {"epoch": 1}, names=names)
    checkpoint.save(tmp_path, contents, "seed: 1\n", 1, True)
    for pointer in ("last", "best"):
        assert checkpoint.names(tmp_path / pointer) == names
    (tmp_path / "last" / checkpoint.NAMES).write_text("[")
    with pytest.raises(UserError, match=r"names.json is damaged"):
        checkpoint.names(tmp_path / "last")
    (tmp_path / "last" / checkpoint.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"names.json cannot be read"):
        checkpoint.names(tmp_path / "last")
    (tmp_path / "best" / checkpoint.NAMES).unlink()
    with pytest.raises(UserError, match=r"has no file names.json"):
        checkpoint.names(tmp_path / "best")
    assert checkpoint.names(save(tmp_path, 2)) == {}


def save_sharded(folder, epoch, best=True):
    digests = checkpoint.stage_rows(folder, loss(float(epoch)), ClassShard(0, 5, 5))
    contents = Contents(5, model(float(epoch)), None, {"epoch": epoch}, digests)
    return checkpoint.save(folder, contents, f"seed: {epoch}\n", epoch, best)


def loaded_epochs(folder) -> dict[str, int]:
    """Which epoch each pointer's checkpoint is of; every file of it must agree."""
    epochs = {}
    for pointer in ("last", "best"):
        if files.located(folder / pointer).exists():
            epoch = checkpoint.load_training(folder / pointer)["epoch"]
            for expected, found in (
                (model(float(epoch)), checkpoint.load_model(folder / pointer)),
                (loss(float(epoch)), checkpoint.load_loss(folder / pointer)),
            ):
                assert found.keys() == expected.keys()
                assert all(found[name].equal(expected[name]) for name in expected)
            assert checkpoint.config_file(folder / pointer).read_text() == f"seed: {epoch}\n"
            epochs[pointer] = epoch
    return epochs


def test_the_last_and_the_best_are_kept_without_links_and_what_else_lies_there(tmp_path, monkeypatch):
    monkeypatch.setattr("os.symlink", no_links)
    monkeypatch.setattr("os.link", no_links)
    (tmp_path / "epoch_0001_keep").mkdir()
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3, best=False)
    save(tmp_path, 4, best=False)
    assert loaded_epochs(tmp_path) == {"last": 4, "best": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "epoch_0001_keep", "last"]


def no_links(*arguments):
    raise OSError(errno.EOPNOTSUPP, "not supported")


def test_the_links_of_version_0_1_are_replaced(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "epoch_0001")
    shutil.rmtree(tmp_path / "best")
    for name in ("last", "best"):
        (tmp_path / name).symlink_to("epoch_0001")
    save(tmp_path, 2, best=False)
    assert loaded_epochs(tmp_path) == {"last": 2, "best": 1}
    assert not (tmp_path / "last").is_symlink()


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


@pytest.mark.slow
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
        assert sorted(path.name for path in folder.iterdir()) == ["best", "last"], "no leftovers"
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
        assert len(list((folder / "checkpoints").iterdir())) == 2, "no leftovers"
        operation += 1


@pytest.mark.slow
@pytest.mark.parametrize("save_next", [save, save_sharded])
def test_a_kill_in_a_sharded_save_leaves_no_rows_to_the_next_checkpoint(tmp_path, save_next):
    operation, died = 0, True
    while died:
        folder = tmp_path / str(operation)
        save(folder, 1)
        died = save_and_die(folder, 2, True, operation, save_sharded)
        assert loaded_epochs(folder)["last"] in (1, 2)
        save_next(folder, 3)
        assert loaded_epochs(folder) == {"last": 3, "best": 3}
        assert (folder / "last" / checkpoint.LOSS_FOLDER).exists() == (save_next == save_sharded)
        assert sorted(path.name for path in folder.iterdir()) == ["best", "last"], "no leftovers"
        operation += 1
    assert operation > 12, "the hook must have seen the file operations, the rows' among them"


def write_two_shards(rank, folder):
    shard = ClassShard.of_rank(5, rank, 2)
    rows = {name: tensor.narrow(checkpoint.AXES[name], shard.first, shard.count) for name, tensor in loss(1.0).items()}
    digests = checkpoint.stage_rows(folder, rows, shard)
    if rank == 0:
        checkpoint.save(folder, Contents(5, model(1.0), None, {"epoch": 1}, digests), "seed: 1\n", 1, True)


@pytest.mark.slow
def test_missing_and_damaged_files_of_rows_are_named(tmp_path):
    on_ranks(2, write_two_shards, tmp_path / "run", folder=tmp_path)
    assert loaded_epochs(tmp_path / "run") == {"last": 1, "best": 1}
    for number, missing in enumerate(("0 to 2", "3 to 4")):
        last = shutil.copytree(tmp_path / "run" / "last", tmp_path / str(number))
        file = sorted((last / checkpoint.LOSS_FOLDER).glob("*.distcp"))[number]
        content = file.read_bytes()
        file.write_bytes(bytes(len(content)))
        with pytest.raises(UserError, match=f"{file.name} is damaged"):
            checkpoint.load_loss(last)
        other = ClassShard.of_rank(5, 1 - number, 2)
        assert len(checkpoint.load_loss(last, other)[checkpoint.CLASSIFIER]) == other.count, "whose rows are whole"
        file.write_bytes(b"x")
        with pytest.raises(UserError, match=f"{file.name} cannot be read"):
            checkpoint.load_loss(last)
        file.unlink()
        with pytest.raises(UserError, match=f"has no file with the rows of classes {missing}"):
            checkpoint.load_loss(last)
    (last / checkpoint.LOSS_FOLDER / ".metadata").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        checkpoint.load_loss(last)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


LOADERS = {
    checkpoint.MODEL: checkpoint.load_model,
    checkpoint.LOSS: checkpoint.load_loss,
    checkpoint.TRAINING: checkpoint.load_training,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_flipped_bit_and_a_file_of_another_epoch_are_named(tmp_path, name):
    last = save(tmp_path, 1)
    save(tmp_path, 2, best=False)
    shutil.copy(tmp_path / "best" / name, last / name)
    with pytest.raises(UserError, match=rf"{name} is damaged, or of another checkpoint: .* of epoch 2"):
        LOADERS[name](last)
    flip_a_bit(tmp_path / "best" / name)
    with pytest.raises(UserError, match=rf"{name} is damaged, or of another checkpoint: .* of epoch 1"):
        LOADERS[name](tmp_path / "best")
    assert checkpoint.read_manifest(last)["epoch"] == 2


@pytest.mark.parametrize("name", LOADERS)
def test_without_a_manifest_what_can_be_checked_is(tmp_path, name):
    last = save(tmp_path, 1)
    (last / checkpoint.MANIFEST).unlink()
    LOADERS[name](last)
    (last / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"{name} cannot be read"):
        LOADERS[name](last)


def test_weights_that_are_not_finite_are_named(tmp_path):
    last = save(tmp_path, float("nan"), best=False)
    with pytest.raises(UserError, match=r"model\.safetensors: neck\.weight is not finite"):
        checkpoint.load_model(last)


def test_settings_that_were_cut_short_are_named(tmp_path):
    contents = Contents(5, model(1.0), loss(1.0), {"epoch": 1})
    checkpoint.save(tmp_path, contents, "optim: {lr: 1, epochs: 2}\nseed: 1\n", 1, False)
    (tmp_path / "last" / checkpoint.CONFIG).write_text("optim: {lr: 1}\nseed: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml was cut short: it has no optim\.epochs"):
        checkpoint.config_file(tmp_path / "last")


def test_a_checkpoint_is_found_by_its_run_its_folder_and_its_file(tmp_path):
    last = save(tmp_path / "run" / "checkpoints", 1)
    for given in (tmp_path / "run", str(last), last / checkpoint.MODEL):
        assert checkpoint.opened(given) == last
    with pytest.raises(UserError, match=r"has no file model.safetensors"):
        checkpoint.opened(tmp_path)


def test_the_training_state_holds_no_code(tmp_path):
    checkpoint.save(tmp_path, Contents(5, model(0.0), loss(0.0), {"epoch": print}), "seed: 1", 1, True)
    with pytest.raises(UserError, match=r"training.pt cannot be read"):
        checkpoint.load_training(tmp_path / "last")

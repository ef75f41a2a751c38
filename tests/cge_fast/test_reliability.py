"""What docs/reliability.md promises: kills at random moments, damaged files, odd settings. Seeds are fixed."""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import small_options
from runs import assert_same_weights, rows, run
from safetensors.torch import save_file
from support import WITHOUT_GPU, forked

from cge_fast import backbones, checkpoint, errors, files, train
from cge_fast.backbones.weights import file_tensors
from cge_fast.cli import RECIPES, read_settings, to_yaml
from cge_fast.errors import UserError

EPOCHS = 6
FORKED = multiprocessing.get_context("forkserver")  # which has imported the packages, and nothing else


def program(arguments: list[str], printed: Path) -> None:
    """The training program in a process of its own; what it prints goes to a file."""
    os.setsid()
    torch.set_num_threads(1)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    errors.run(lambda: train.main(arguments), train.PROGRAM)


def listed(selection: str, number: int) -> list[int]:
    """The processes that ps selects."""
    done = subprocess.run(["ps", "-o", "pid=", selection, str(number)], capture_output=True, text=True)
    return [int(number) for number in done.stdout.split()]


def start(arguments: list[str], printed: Path) -> multiprocessing.Process:
    process = FORKED.Process(target=program, args=(arguments, printed))
    with forked():
        process.start()
    return process


def ended(process: multiprocessing.Process, printed: Path, seconds: int = 60) -> tuple[int, str]:
    """Exit status, and the last line that the program printed; neither a traceback nor a process is left."""
    process.join(seconds)
    assert process.exitcode is not None, f"it hangs: {printed.read_text()}"
    text = printed.read_text(errors="replace").replace("\r", "\n")
    assert "Traceback" not in text
    for _ in range(80):  # a loader's process looks for its parent every five seconds
        if not (left := listed("-s", process.pid)):
            break
        time.sleep(0.1)
    assert not left, "a process outlives its program"
    return process.exitcode, text.strip().splitlines()[-1] if text.strip() else ""


def options_of(market: Path, output: Path) -> list[str]:
    return [*small_options(market, output), "--optim.epochs", str(EPOCHS), "--evaluation.every", "2"]


@pytest.fixture(scope="module")
def whole(shared_market) -> Path:
    """The run that nobody disturbs."""
    output, printed = shared_market.with_name("whole"), shared_market.with_name("whole.txt")
    assert ended(start(options_of(shared_market, output), printed), printed)[0] == 0
    return output


def kill(kind: str, process: multiprocessing.Process, folder: Path, market: Path, chance: random.Random) -> None:
    """Ends a program, or what it needs, in one of several ways."""
    printed = folder / "printed.txt"
    if kind == "run":
        process.kill()
        process.join()
    elif kind == "signal":
        number = chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number) if chance.random() < 0.5 else os.kill(process.pid, number)
        status, line = ended(process, printed)
        assert status in (0, 128 + number), line
        assert status == 0 or f"interrupted by {number.name}" in line
    elif kind == "worker":
        workers = listed("--ppid", process.pid)
        with suppress(ProcessLookupError, IndexError):
            os.kill(chance.choice(workers), signal.SIGKILL)
        status, line = ended(process, printed)
        assert status in (0, 2), line
        assert status == 0 or "a process that loads images has died" in line
    else:  # another one comes, in the end to a folder that is free
        second = start([*options_of(market, folder / "run"), "--resume"], folder / "second.txt")
        status, line = ended(second, folder / "second.txt")
        first = ended(process, printed)
        assert first[0] == 0, first
        assert status == 0 or ("in use by" in line or "has no file" in line), line


def disturb(kind: str, number: int, tmp_path: Path, market: Path, whole: Path) -> bool:
    """One training, disturbed at a random moment, then resumed: its weights must be those of the one that was not.

    Whether it was disturbed before its end.
    """
    chance = random.Random(f"{kind} {number}")
    folder, output = tmp_path / f"{kind}{number}", tmp_path / f"{kind}{number}" / "run"
    folder.mkdir()
    has_workers = kind == "worker" or (kind == "signal" and number % 2)
    arguments = [*options_of(market, output), "--data.workers", "2" if has_workers else "0"]
    process = start(arguments, folder / "printed.txt")
    while process.is_alive() and not (output / files.LOCK).exists():
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1))
    kill(kind, process, folder, market, chance)
    resuming = ["--resume"] if files.located(output / "checkpoints" / "last").exists() else []
    status, line = ended(start([*options_of(market, output), *resuming], folder / "again.txt"), folder / "again.txt")
    assert status == 0, line
    assert_same_weights(output, whole)
    assert [row["epoch"] for row in rows(output)] == list(range(EPOCHS + 1))
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"last", "best"}
    written = {"checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "report.html", "tensorboard"}
    assert {path.name for path in output.iterdir()} == written
    shutil.rmtree(folder)
    return process.exitcode != 0 or kind == "writer"


THOROUGH = pytest.mark.slow, pytest.mark.thorough  # both, so that `-m slow` runs them and `-m 'not slow'` none
FEW, MANY = {"run": 6, "signal": 6, "worker": 4, "writer": 4}, {"run": 60, "signal": 60, "worker": 40, "writer": 30}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"), [*FEW.items(), *(pytest.param(*one, marks=pytest.mark.thorough) for one in MANY.items())]
)
def test_disturbed_trainings_end_with_the_weights_of_an_undisturbed_one(kind, kills, tmp_path, shared_market, whole):
    disturbed = [disturb(kind, number, tmp_path, shared_market, whole) for number in range(kills)]
    assert sum(disturbed) >= kills // 4, "the others came to their end before"


def on_two_ranks(arguments: list[str]) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "cge_fast.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cge_fast.train",
    ]
    environment = os.environ | WITHOUT_GPU | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_ten_killed_ranks_end_the_others_in_a_minute_and_the_runs_go_on(tmp_path, shared_market):
    arguments = [*options_of(shared_market, tmp_path / "whole"), "--model.shard_classes", "true"]
    assert on_two_ranks(arguments).wait(120) == 0
    for number in range(10):
        chance, output = random.Random(number), tmp_path / f"run{number}"
        arguments = [*options_of(shared_market, output), "--model.shard_classes", "true", "--optim.epochs", str(EPOCHS)]
        process = on_two_ranks(arguments)
        while process.poll() is None and not (output / files.LOCK).exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.5))
        ranks = listed("--ppid", process.pid)
        with suppress(ProcessLookupError, IndexError):
            os.kill(chance.choice(ranks), signal.SIGKILL)
        _, printed = process.communicate(timeout=60)
        assert process.returncode in (0, 137), printed
        assert "Traceback" not in printed
        assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
        resuming = ["--resume"] if files.located(output / "checkpoints" / "last").exists() else []
        assert on_two_ranks([*arguments, *resuming]).wait(120) == 0
        assert_same_weights(output, tmp_path / "whole")


ODD = [
    *(
        "null",
        "~",
        ".inf",
        "-.inf",
        ".nan",
        "1e30",
        "-1",
        "0",
        "true",
        "''",
        "[]",
        "{}",
        "[",
        "{",
        "}",
        ":",
        "|",
        "---",
    ),
    *("&a", "*a", "&a [*a]", "<<: *a", "class_path: os.system", "!!python/object/apply:os.abort []", "!!binary x"),
    *("...", "%YAML 9.9", "? x", "\x00", "\t", "\ufeff", "é", "2001-99-99", "/etc/passwd", "[" * 200, "9" * 5000),
]


def odd_settings(text: str, chance: random.Random) -> str:
    """YAML with one to three faults."""
    for _ in range(chance.randint(1, 3)):
        lines = text.splitlines(keepends=True) or [""]
        index = chance.randrange(len(lines))
        key = lines[index].partition(":")[0]
        match chance.randrange(6):
            case 0:
                lines[index] = f"{key}: {chance.choice(ODD)}\n"
            case 1:
                lines.insert(index, chance.choice(lines))
            case 2:
                lines[index] = lines[index].replace(chance.choice(lines[index] or " "), chance.choice(ODD), 1)
            case 3:
                lines[index] = " " * chance.randint(0, 6) + lines[index].lstrip()
            case 4:
                del lines[chance.randrange(len(lines)) :]
            case _:
                lines.insert(index, f"{' ' * chance.choice((0, 2))}{chance.choice(ODD)}: {chance.choice(ODD)}\n")
        text = "".join(lines)
    return text


def assert_is_one_line(error: BaseException) -> None:
    """A person reads one line, and the exit status is 2."""
    end = errors.ending(error)
    assert end is not None, repr(error)
    assert end[1] == 2
    assert end[0].isprintable()


FEW_OR_MANY = [100, pytest.param(4000, marks=THOROUGH)]


@pytest.mark.parametrize("count", FEW_OR_MANY)
def test_odd_settings_are_read_or_end_in_one_line(tmp_path, count):
    texts = [path.read_text() for path in RECIPES.glob("*.yaml")]
    texts.append(to_yaml(train.parse(["--output", "run"])[0]))
    file, read = tmp_path / "settings.yaml", 0
    for number in range(count):
        chance = random.Random(f"settings {number}")
        file.write_text(odd_settings(chance.choice(texts), chance))
        before = time.perf_counter()
        try:
            config = train.parse(["--config", str(file)])[0] if number % 2 else read_settings(file)
            (tmp_path / "again.yaml").write_text(to_yaml(config))
            read_settings(tmp_path / "again.yaml")
            read += 1
        except Exception as error:
            assert_is_one_line(error)
        assert time.perf_counter() - before < 5
    assert count / 20 < read < count / 2


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A file after one fault of a disk, a network or a hand."""
    start, length = chance.randrange(len(content)), chance.randint(1, 5000)
    match chance.randrange(5):
        case 0:
            return content[:start] + bytes([content[start] ^ 1 << chance.randrange(8)]) + content[start + 1 :]
        case 1:
            return content[:start]
        case 2:
            return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]
        case 3:
            return content[:start] + chance.randbytes(length) + content[start:]
        case _:
            return content[:start] + content[start + length :]


def read_all(folder: Path) -> dict:
    """Everything in a checkpoint, by name."""
    read_settings(checkpoint.config_file(folder))
    training = checkpoint.load_training(folder)
    of_optimizer = {
        f"{number} {name}": value
        for number, state in training["optimizer"]["state"].items()
        for name, value in state.items()
    }
    assert checkpoint.identities(folder) == 4
    return checkpoint.load_model(folder) | checkpoint.load_loss(folder) | of_optimizer


def assert_equal_tensors(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("count", FEW_OR_MANY)
def test_a_damaged_checkpoint_ends_in_one_line_or_is_read_as_it_was(shared_run, tmp_path, count):
    folder = Path(shutil.copytree(shared_run / "checkpoints" / "last", tmp_path / "last"))
    whole, contents = read_all(folder), {path: path.read_bytes() for path in sorted(folder.iterdir())}
    refused = 0
    for number in range(count):
        chance = random.Random(f"checkpoint {number}")
        path = chance.choice(list(contents))
        path.write_bytes(damaged(contents[path], chance))
        try:
            assert_equal_tensors(read_all(folder), whole)
        except Exception as error:
            assert_is_one_line(error)
            refused += 1
        path.write_bytes(contents[path])
    assert refused > 0.7 * count, "the others are settings and digests that are as good as before"


@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=THOROUGH)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_weights_end_in_one_line_or_are_read(tmp_path, count, suffix):
    network = backbones.build("compact")
    file = tmp_path / f"weights{suffix}"
    wanted = network.state_dict()
    torch.save(wanted, file) if suffix == ".pth" else save_file(wanted, file)
    content = file.read_bytes()
    for number in range(count):
        file.write_bytes(damaged(content, random.Random(f"weights {number}")))
        try:
            found = file_tensors(file, "compact")
        except UserError as error:
            assert_is_one_line(error)
        else:
            if suffix == ".pth":  # the other has no checksums
                assert_equal_tensors(found, dict(wanted))


def test_a_stale_lock_of_this_computer_is_taken_and_that_of_another_is_named(options, tmp_path, capsys):
    lock = tmp_path / "run" / files.LOCK
    lock.parent.mkdir()
    lock.write_text("elsewhere 7 0\n")
    status, _, err = run(options, capsys)
    assert status == 2
    assert f"is in use by process 7 on elsewhere; if that has ended, remove {lock}" in err
    lock.write_bytes(b"\xff\xfe garbage\n")
    assert run(options, capsys)[0] == 2
    lock.write_text(f"{socket.gethostname()} 7 0\n")
    assert run(options, capsys)[0] == 0
    assert not lock.exists()

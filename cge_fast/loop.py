"""Epochs: momentum, rate, step, log, evaluate, save."""

import hashlib
import json
import math
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from cge_fast import checkpoint, files
from cge_fast.build import Run
from cge_fast.cli import read_settings, to_yaml
from cge_fast.data.batches import train_labels
from cge_fast.data.images import Image, names
from cge_fast.data.sets import nothing_to_find
from cge_fast.distributed import any_rank, collect_rows, copy_from_first_rank, rank, world_size
from cge_fast.errors import UserError, notice
from cge_fast.evaluation.features import evaluate
from cge_fast.log import Log, epoch_line, retrieval_text, scalars
from cge_fast.loggers import Loggers
from cge_fast.metrics import EpochMetrics
from cge_fast.profile import StepProfile, part
from cge_fast.progress import progress, say
from cge_fast.report import ENVIRONMENT, environment
from cge_fast.schedule import learning_rate, memory_momentum
from cge_fast.step import training_step

LOG_EVERY = 10  # steps, after which losses are fetched from the device, shown and checked
RETRIEVAL = ("mAP", "rank1", "rank5", "rank10", "mINP")


def train(run: Run, profile: StepProfile | None = None) -> None:
    """Trains the epochs that remain, with a progress bar; afterwards `run.result` has the last epoch's evaluation.

    Raises:
        UserError: an image cannot be read, or the loss is not finite.
    """
    config, epochs, steps, log = run.config, run.config.optim.epochs, len(run.loader), None
    if run.epochs_done == 0 and config.evaluation.untrained:
        run.untrained = evaluation(run)
    with ExitStack() as stack:  # closes the logs after an error too
        if rank() == 0:
            log = Log(config.output, run.epochs_done or None, run.row)
            stack.callback(log.close)
            loggers = Loggers(config.loggers, config.output, yaml.safe_load(to_yaml(config)), run.epochs_done > 0)
            stack.push(loggers.close)
            files.replace(config.output / checkpoint.CONFIG, to_yaml(config).encode())
            files.replace(config.output / ENVIRONMENT, json.dumps(environment(run.device, world_size())).encode())
            if run.epochs_done == 0 and run.untrained:
                log.write({"epoch": 0, **run.untrained})
                say(f"untrained: {retrieval_text(run.untrained)}")
        total, done = epochs * steps, run.epochs_done * steps
        shown = progress(what="training", unit="steps", total=total, initial=done, show=rank() == 0)
        bar = stack.enter_context(shown)
        for epoch in range(run.epochs_done + 1, epochs + 1):
            if config.optim.patience and run.evaluations_since_best >= config.optim.patience:
                notice(f"optim.patience: ends after epoch {run.epochs_done}, best mAP {run.best_map:.1%}")
                break
            bar.set_description_str(f"epoch {epoch}/{epochs}")
            momentum = memory_momentum(config.model.memory_momentum, epoch, epochs)
            start = time.perf_counter()
            metrics = train_epoch(run, epoch, momentum, bar, profile)
            seconds = time.perf_counter() - start
            measured, failure = None, None
            if epoch == epochs or (config.evaluation.every and epoch % config.evaluation.every == 0):
                try:
                    measured = evaluation(run)
                except UserError as error:  # the epoch's work is kept all the same
                    failure = error
            run.epochs_done, run.result = epoch, measured
            is_best = measured is not None and measured["mAP"] > run.best_map
            run.best_map = measured["mAP"] if is_best else run.best_map
            if measured:
                run.evaluations_since_best = 0 if is_best else run.evaluations_since_best + 1
            run.row = {"epoch": epoch, **metrics.row(), "lr": run.optimizer.param_groups[-1]["lr"]}
            run.row["momentum"] = momentum if run.criterion.has_memory else None
            run.row |= {"images_per_second": metrics.samples / seconds, "seconds": seconds}
            run.row |= measured or dict.fromkeys(RETRIEVAL)
            if log:
                log.write(run.row)
                loggers.write(scalars(run.row), epoch)
                say(epoch_line(run.row, epochs))
            save(run, is_best)
            if failure:
                raise failure
    if run.result is None:  # the last epoch was trained, but its evaluation failed
        run.result = evaluation(run)


def train_epoch(run: Run, epoch: int, momentum: float, bar: Any, profile: StepProfile | None = None) -> EpochMetrics:
    """One epoch of training steps; checks that all stays finite.

    Raises:
        UserError: a loss, parameter or buffer is not finite.
    """
    run.model.train()
    run.criterion.train()
    freeze_backbone(run, epoch)
    run.sampler.epoch = epoch
    torch.manual_seed(run.config.seed + epoch)  # whatever a loss may draw, a resumed run draws it too
    steps, pieces = len(run.loader), run.config.optim.accumulate
    metrics = EpochMetrics(
        run.config.loss.weights, run.model.pool.stripes if run.criterion.has_memory else 0, run.device
    )
    batches = iter(run.loader)
    for step in range(steps):
        if profile:
            profile.step()
        with part("waiting for data"):
            pixels, drawn, labels = (tensor.to(run.device, non_blocking=True) for tensor in next(batches))
        with part("augmentation"):
            images = run.augment(pixels, drawn)
        set_rates(run, learning_rate(run.config.optim, epoch - 1 + step / steps, steps))
        log_step = (step + 1) % LOG_EVERY == 0 or step == steps - 1
        training_step(run, images, labels, momentum, metrics, log_step)
        with part("bookkeeping"):
            bar.update()
            if log_step:
                losses = metrics.fold()  # of the micro-batches since the last log step
                for ago, loss in enumerate(losses[::-1]):
                    if not math.isfinite(loss):
                        raise not_finite(f"the loss of step {step + 1 - ago // pieces} of epoch {epoch}")
                show(run, bar, losses[-1], metrics)
    if profile:
        profile.stop()
    tensors = (*run.model.state_dict().values(), *run.criterion.state_dict().values())
    finite = all(tensor.isfinite().all() for tensor in tensors)
    if any_rank(not finite, run.device):  # with shards it may be in one rank's rows alone
        raise not_finite(f"a parameter or buffer after epoch {epoch}")
    metrics.all_reduce()
    copy_from_first_rank(run.model.buffers())
    if run.average:
        copy_from_first_rank(run.average.module.buffers())
    if run.shard is None:
        copy_from_first_rank(run.criterion.buffers())
    return metrics


def freeze_backbone(run: Run, epoch: int) -> None:
    """Makes the backbone learn in this epoch or not, as optim.freeze_backbone says."""
    is_frozen = epoch <= run.config.optim.freeze_backbone
    if is_frozen and not run.frozen:
        run.frozen = [parameter for parameter in run.model.backbone.parameters() if parameter.requires_grad]
    for parameter in run.frozen:
        parameter.requires_grad_(not is_frozen)
    run.model.backbone.train(not is_frozen)


def set_rates(run: Run, rate: float) -> None:
    """Sets the learning rate, of each group the share that it has."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)  # a checkpoint of before has none


def evaluation(run: Run) -> dict[str, float] | None:
    """mAP, CMC and mINP of the network on the query and gallery of the set; None if it cannot be evaluated on."""
    if nothing_to_find(run.reid_set):
        return None
    return evaluate(run.deployed, run.reid_set, run.config.data, run.config.evaluation).row()


def show(run: Run, bar: Any, loss: float, metrics: EpochMetrics) -> None:
    """Puts loss, identity accuracy and images/s on the progress bar (which shows the time left by itself)."""
    images_per_second = (bar.format_dict["rate"] or 0) * run.config.data.identities * run.config.data.instances
    bar.set_postfix_str(f"loss {loss:.3f}, accuracy {metrics.accuracy:.1%}, {images_per_second:.0f} images/s")


def not_finite(what: str) -> UserError:
    """The error of a diverged training."""
    return UserError(f"{what} is not finite; try a smaller optim.lr or optim.precision float32")


def way_on(run: Run) -> str:
    """After an error or a signal: what there is to go on from, and how."""
    try:
        epoch = checkpoint.read_manifest(checkpoint.opened(run.checkpoints / "last"))["epoch"]
    except (UserError, OSError, KeyError):
        return "there is no checkpoint to go on from"
    program = "experiments.variants" if run.config.loss.variant else "train"
    command = f"python -m cge_fast.{program} --output {shlex.quote(str(run.config.output))} --resume"
    return f"the last checkpoint is {run.checkpoints / 'last'}, of epoch {epoch}; {command} goes on from there"


def save(run: Run, is_best: bool) -> None:
    """Writes a checkpoint of the run as it stands; every rank calls it."""
    loss, optimizer, digests = run.criterion.state_dict(), run.optimizer.state_dict(), {}
    if run.shard:
        number = classifier_number(run)
        state = dict(optimizer["state"][number])  # a copy: the optimizer goes on with its own
        optimizer["state"] = {**optimizer["state"], number: state}
        moments = [name for name in checkpoint.MOMENTS if name in state]
        rows = loss | {name: state.pop(name) for name in moments}
        if run.config.model.shard_checkpoints:
            digests, loss = checkpoint.stage_rows(run.checkpoints, rows, run.shard), None
        else:
            for name in (checkpoint.CLASSIFIER, checkpoint.MEMORY, *moments):
                rows[name] = collect_rows(rows[name], run.shard, checkpoint.AXES[name])
            state |= {name: rows.pop(name) for name in moments}
            loss = rows
    if rank() > 0:
        return
    training = {
        "epoch": run.epochs_done,
        "optimizer": optimizer,
        "model": run.model.state_dict() if run.average else None,
        "scaler": run.scaler.state_dict(),
        "best_map": run.best_map,
        "evaluations_since_best": run.evaluations_since_best,
        "untrained": run.untrained,
        "result": run.result,
        "row": run.row,
        **images_digests(run),
    }
    model, called = run.deployed.state_dict(), names(run.reid_set.train)
    contents = checkpoint.Contents(run.num_classes, model, loss, training, digests, called)
    checkpoint.save(run.checkpoints, contents, to_yaml(run.config), run.epochs_done, is_best)


def resume(run: Run) -> None:
    """Takes up the run's last checkpoint: the epochs that follow are those of an uninterrupted run.

    Raises:
        UserError: there is no checkpoint, or it does not fit the settings or the images.
    """
    last = checkpoint.opened(run.checkpoints / "last")
    deployed = checkpoint.load_model(last)
    checkpoint.fit(run.deployed, deployed, last)
    checkpoint.fit(run.criterion, checkpoint.load_loss(last, run.shard), last)
    training = checkpoint.load_training(last)
    optimizer = read_settings(checkpoint.config_file(last)).optim.optimizer
    if optimizer != run.config.optim.optimizer:
        raise UserError(f"optim.optimizer: {run.config.optim.optimizer}, but the run was trained with {optimizer}")
    checkpoint.fit(run.model, training.get("model") or deployed, last)  # only an average differs from what is trained
    try:
        if checkpoint.CLASSIFIER in dict(run.criterion.named_parameters()):
            moments = training["optimizer"]["state"][classifier_number(run)]
            moments |= checkpoint.load_moments(last, moments, run.shard)
        run.optimizer.load_state_dict(training["optimizer"])
        run.scaler.load_state_dict(training["scaler"])
        run.epochs_done, run.best_map = training["epoch"], training["best_map"]
        run.evaluations_since_best = training.get("evaluations_since_best", 0)
        run.untrained, run.result, run.row = training["untrained"], training["result"], training.get("row")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {last} holds the training state of another program ({error})") from error
    changed = {part for part, digest in images_digests(run).items() if training.get(part, digest) != digest}
    if "train_images" in changed:
        raise UserError(
            f"data: the images or their identities are not those that {last} was trained on; restore them, or begin "
            "another run from its model.safetensors with --model.weights"
        )
    if "test_images" in changed:
        notice(
            "data: queries or gallery have changed: figures, and the choice of `best`, are of the new ones from now on"
        )
        run.best_map, run.evaluations_since_best, run.untrained, run.result = -math.inf, 0, None, None
    if run.config.optim.epochs < run.epochs_done:
        raise UserError(f"optim.epochs: {run.config.optim.epochs}, but the run has done {run.epochs_done}")
    for group in run.optimizer.param_groups:
        group["weight_decay"] = run.config.optim.weight_decay


def classifier_number(run: Run) -> int:
    """Of the classifier's weight among the parameters, as the optimizer counts them."""
    names = [name for name, _ in run.criterion.named_parameters()]
    return len([*run.model.parameters()]) + names.index(checkpoint.CLASSIFIER)


def images_digests(run: Run) -> dict[str, str]:
    """SHA-256 of the images to train on, by folder and name, with their labels, and of those to test on, with all."""
    reid_set = run.reid_set
    labels = train_labels(reid_set.train)  # these stay when other people in the test change the identities' numbers
    said = {
        "train_images": [f"{name(image)} {label}" for image, label in zip(reid_set.train, labels, strict=True)],
        "test_images": [
            f"{split} {name(image)} {image.identity} {image.camera}"
            for split in ("query", "gallery")
            for image in getattr(reid_set, split)
        ],
    }
    return {part: hashlib.sha256("\n".join(lines).encode()).hexdigest() for part, lines in said.items()}


def name(image: Image) -> str:
    """Folder and name, also of a file whose name is no text."""
    return ascii(f"{image.path.parent.name}/{image.path.name}")


def holds_run(output: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return files.located(output / "checkpoints" / "last").exists()

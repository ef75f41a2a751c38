"""A training run: steps, epochs, figures and checkpoints."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cge_fast import checkpoint, data, model
from cge_fast.data.batches import train_labels, train_loader
from cge_fast.data.sampler import PKSampler
from cge_fast.distributed import (
    any_rank,
    collect_rows,
    copy_from_first_rank,
    gather_with_gradient,
    rank,
    sum_over_ranks,
    world_size,
)
from cge_fast.errors import UserError
from cge_fast.log import Log
from cge_fast.losses.center import CentreLoss
from cge_fast.losses.cge import memory_alpha
from cge_fast.losses.metric import metric_loss
from cge_fast.operators import check_backend
from cge_fast.options import LossConfig, TrainConfig, to_yaml
from cge_fast.profile import Stopwatch
from cge_fast.schedule import learning_rate

STEPS_BETWEEN_LOOKS = 10  # how often losses are fetched from the device, shown and checked
RETRIEVAL = ("mAP", "rank1", "rank5", "rank10", "mINP")


class EpochSums(NamedTuple):
    """What an epoch adds up, on the device."""

    losses: Tensor  # (3,): classification, metric and centre loss, times samples
    samples: Tensor  # 0-d
    hits: Tensor  # 0-d
    weights: Tensor  # (3,): w of the label, mean w over all classes, samples; of the steps that are looked at
    stripe_hits: Tensor  # (n,)
    levels: Tensor  # (n+1,): samples of which 0..n stripes are right, the hardest first

    @classmethod
    def zeros(cls, stripes: int, device: torch.device) -> "EpochSums":
        """The sums of an epoch that begins."""
        return cls(*(torch.zeros(shape, device=device) for shape in (3, (), (), 3, stripes, stripes + 1)))


class Training:
    """Everything that a run consists of.

    Args:
        config: the settings; `config.output` is set.
        device: where to compute.
        profile: time the parts of every step.

    Raises:
        UserError: data and settings do not fit.
    """

    def __init__(self, config: TrainConfig, device: torch.device, profile: bool = False):
        check_backend(config.kernels, device)
        self.config, self.device = config, device
        self.checkpoints = config.output / "checkpoints"
        torch.manual_seed(config.seed)
        self.reid_set = data.read(config.data)
        labels = train_labels(self.reid_set.train)
        self.sampler = PKSampler(
            labels, config.data.identities, config.data.instances, config.seed, rank(), world_size()
        )
        share = config.data.identities // world_size()
        pieces = config.optim.accumulate
        if share % pieces:
            raise UserError(f"optim.accumulate: {share} identities cannot be cut evenly into {pieces}")
        if config.loss.l2 and config.data.identities // pieces < 2:
            raise UserError(
                "loss.l2: the metric loss needs 2 identities in a micro-batch, so at least twice as many "
                f"data.identities as optim.accumulate, got {config.data.identities} and {pieces}"
            )
        if share // pieces * config.data.instances < 2:
            raise UserError("data.instances: BatchNorm needs 2 images in a process's micro-batch, got 1")
        pin_memory = device.type == "cuda"
        self.loader = train_loader(self.reid_set.train, self.sampler, config.data, pin_memory)
        self.precision = model.compute_precision(config.optim.precision, device)
        if config.model.shard_classes and self.precision == torch.float16:
            raise UserError("model.shard_classes: float16's loss scaling would differ between ranks, use bfloat16")
        network = model.build(
            config.model,
            config.loss,
            config.data,
            max(labels) + 1,
            config.optim.epochs,
            self.precision,
            config.kernels,
        )
        if world_size() > 1 and device.type == "cuda":  # SyncBatchNorm exists on GPUs only
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network = network.to(device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay, fused=True
        )
        channels = self.network.head.classifier.in_features
        self.centre = (
            CentreLoss(max(labels) + 1, channels, config.loss.centre_lr, device) if config.loss.centre else None
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.stopwatch = Stopwatch(device) if profile else None
        if self.stopwatch:
            self.stopwatch.watch(self.network.backbone)
        self.epochs_done = 0
        self.best_map = -math.inf
        self.untrained: dict[str, float] | None = None
        self.result: dict[str, float] | None = None

    def resume(self) -> None:
        """Takes up the run's last checkpoint: the epochs that follow are those of an uninterrupted run, bit for bit.

        Raises:
            UserError: there is no checkpoint, or it does not fit the settings.
        """
        last = self.checkpoints / "last"
        shard = self.network.head.shard
        checkpoint.fit(self.network, checkpoint.load_weights(last, shard), last)
        state = checkpoint.load_training(last)
        try:
            moments = state["optimizer"]["state"][self.classifier_number]
            moments |= checkpoint.load_moments(last, moments, shard)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.centre:
                self.centre.centres.copy_(state["centres"])
            set_random_state(state["random"])
            self.epochs_done, self.best_map = state["epoch"], state["best_map"]
            self.untrained, self.result = state["untrained"], state["result"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"checkpoint {last} holds the training state of another program ({error})") from error
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.optim.weight_decay

    def run(self) -> None:
        """Trains the epochs that remain, with a progress bar; afterwards `result` has the last epoch's figures.

        Raises:
            UserError: an image cannot be read, or the loss is not finite.
        """
        config, epochs, steps = self.config, self.config.optim.epochs, len(self.loader)
        log = None
        if self.epochs_done == 0 and config.evaluation.untrained:
            self.untrained = self.evaluate()
        if rank() == 0:
            log = Log(config.output, self.epochs_done or None)
            (config.output / checkpoint.CONFIG).write_text(to_yaml(config))
            if self.epochs_done == 0 and self.untrained:
                log.write({"epoch": 0, **self.untrained})
        wrapped: nn.Module = self.network
        if world_size() > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            if self.network.head.shard:
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.network, checkpoint.SHARDED)
            # No broadcast of buffers at every step: the memory is equal anyway, statistics are shared once an epoch.
            wrapped = DistributedDataParallel(self.network, device_ids=device_ids, broadcast_buffers=False)
        bar = tqdm(total=epochs * steps, initial=self.epochs_done * steps, unit=" step", disable=rank() > 0)
        with bar:
            for epoch in range(self.epochs_done + 1, epochs + 1):
                bar.set_description(f"epoch {epoch}/{epochs}")
                start = time.perf_counter()
                sums = self.train_epoch(wrapped, epoch, bar)
                seconds = time.perf_counter() - start
                measured, failure = None, None
                if epoch == epochs or (config.evaluation.every and epoch % config.evaluation.every == 0):
                    try:
                        measured = self.evaluate()
                    except UserError as error:  # the epoch's work is kept all the same
                        failure = error
                self.epochs_done, self.result = epoch, measured
                is_best = measured is not None and measured["mAP"] > self.best_map
                self.best_map = measured["mAP"] if is_best else self.best_map
                if log:
                    row = self.figures(epoch, sums, seconds) | (measured or dict.fromkeys(RETRIEVAL))
                    log.write(row)
                self.save(is_best)
                if failure:
                    raise failure
        if self.result is None:  # the last epoch was trained, but its evaluation failed
            self.result = self.evaluate()
        if log:
            log.close()

    def train_epoch(self, wrapped: nn.Module, epoch: int, bar: tqdm) -> EpochSums:
        """One epoch of optimiser steps, each followed by a memory write; checks that all stays finite."""
        wrapped.train()
        self.sampler.epoch = epoch
        sums = EpochSums.zeros(self.network.head.stripes, self.device)
        unseen: list[Tensor] = []
        if self.stopwatch:
            self.stopwatch.start()
        for step, (images, labels) in enumerate(self.loader):
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
            self.lap("waiting for data")
            rate = learning_rate(self.config.optim, epoch - 1 + step / len(self.loader), len(self.loader))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            looks = len(unseen) == STEPS_BETWEEN_LOOKS - 1 or step == len(self.loader) - 1
            unseen.append(self.step(wrapped, images, labels, epoch, sums, looks))
            bar.update()
            if looks:
                factors = torch.tensor(loss_factors(self.config.loss), device=self.device)
                losses = (torch.stack(unseen) @ factors).tolist()
                for number, loss in enumerate(losses, start=step + 2 - len(losses)):
                    if not math.isfinite(loss):
                        raise self.not_finite(f"the loss of step {number} of epoch {epoch}")
                self.show(bar, losses[-1], sums)
                unseen.clear()
            self.lap("bookkeeping")
        finite = all(tensor.isfinite().all() for tensor in self.network.state_dict().values())
        if any_rank(not finite, self.device):  # with shards it may be in one rank's rows alone
            raise self.not_finite(f"a parameter or buffer after epoch {epoch}")
        for tensor in sums:
            sum_over_ranks(tensor)
        shared = self.network.named_buffers()
        copy_from_first_rank(
            buffer for name, buffer in shared if not (self.network.head.shard and name in checkpoint.SHARDED)
        )
        return sums

    def step(
        self, wrapped: nn.Module, images: Tensor, labels: Tensor, epoch: int, sums: EpochSums, looks: bool = False
    ) -> Tensor:
        """One optimiser step and memory write; returns classification, metric and centre loss (3,), detached.

        looks: add up the revision's weights too, which costs one more revision.
        """
        config, pieces = self.config.loss, self.config.optim.accumulate
        factors = torch.tensor(loss_factors(config), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(3, device=self.device)
        local_features, centred = [], []
        for number, (piece, piece_labels) in enumerate(
            zip(images.chunk(pieces), labels.chunk(pieces), strict=True), start=1
        ):
            waits = isinstance(wrapped, DistributedDataParallel) and number < pieces
            with wrapped.no_sync() if waits else nullcontext():
                out = wrapped(piece, piece_labels)
                all_features, all_labels = gather_with_gradient(out.global_feature), gather_with_gradient(piece_labels)
                metric = metric_loss(all_features, all_labels, config.metric, config.margin)
                centre = self.centre(all_features, all_labels) if self.centre else metric.new_zeros(())
                parts = torch.stack([out.loss, metric, centre])
                loss = parts @ factors
                self.lap("head forward and losses")
                self.scaler.scale(loss / pieces).backward()
                self.lap("backbone backward")
            losses += parts.detach() / pieces
            local_features.append(out.local_features)
            centred.append((all_features.detach(), all_labels))
            sums.hits.add_(out.hit.sum())
            if out.local_hit is not None:
                sums.stripe_hits.add_(out.local_hit.sum(dim=0))
                sums.levels.add_(out.local_hit.sum(dim=1).bincount(minlength=out.local_hit.shape[1] + 1))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lap("optimiser")
        for all_features, all_labels in centred if self.centre else []:
            self.centre.update(all_features, all_labels)
        if self.network.head.cge:
            features = torch.cat(local_features)
            if looks:
                weights = self.network.head.label_and_mean_weight(features, labels)
                sums.weights.add_(torch.cat([weights, weights.new_tensor([len(labels)])]))
            self.network.head.write_memory(features, labels, epoch)
        self.lap("memory write")
        sums.losses.add_(losses * len(labels))
        sums.samples.add_(len(labels))
        return losses

    def evaluate(self) -> dict[str, float]:
        """The network's figures on the query and gallery of the set."""
        found = model.evaluate(self.network, self.reid_set, self.config.data, self.config.evaluation)
        return dict(zip(RETRIEVAL, (found.mAP, found.rank(1), found.rank(5), found.rank(10), found.mINP), strict=True))

    def figures(self, epoch: int, sums: EpochSums, seconds: float) -> dict[str, Any]:
        """An epoch's row of metrics.jsonl, but for the evaluation."""
        samples = sums.samples.item()
        losses = (sums.losses / samples).tolist()
        label_weight, mean_weight = (sums.weights[:2] / sums.weights[2]).tolist()
        cge = self.config.model.cge
        return {
            "epoch": epoch,
            "loss": sum(factor * loss for factor, loss in zip(loss_factors(self.config.loss), losses, strict=True)),
            **dict(zip(("classification", "metric", "centre"), losses, strict=True)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "alpha": memory_alpha(self.config.model.alpha, epoch, self.config.optim.epochs) if cge else None,
            "train_accuracy": sums.hits.item() / samples,
            "label_weight": label_weight if cge else None,
            "mean_weight": mean_weight if cge else None,
            "stripe_precision": (sums.stripe_hits / samples).tolist() if cge else None,
            "levels": (sums.levels / samples).tolist() if cge else None,
            "images_per_second": samples / seconds,
            "seconds": seconds,
        }

    def save(self, is_best: bool) -> None:
        """Writes a checkpoint of the run as it stands; every rank calls it."""
        weights, optimizer, shard = self.network.state_dict(), self.optimizer.state_dict(), self.network.head.shard
        stages = shard is not None and self.config.model.shard_checkpoints
        if shard:
            self.take_rows(weights, optimizer)
        if rank() > 0:
            return
        state = {
            "epoch": self.epochs_done,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "centres": self.centre.centres if self.centre else None,
            "random": random_state(),
            "best_map": self.best_map,
            "untrained": self.untrained,
            "result": self.result,
        }
        checkpoint.save(self.checkpoints, weights, state, to_yaml(self.config), self.epochs_done, is_best, stages)

    def take_rows(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Puts the rows of all ranks together in rank 0's, or writes them to a file of each rank and takes them out."""
        number = self.classifier_number
        state = dict(optimizer["state"][number])  # a copy: the optimiser goes on with its own
        moments = {name: state.pop(name) for name in checkpoint.MOMENTS}
        optimizer["state"] = {**optimizer["state"], number: state}
        if self.config.model.shard_checkpoints:
            rows = {name: weights.pop(name) for name in checkpoint.SHARDED}
            checkpoint.stage_rows(self.checkpoints, rows | moments, self.network.head.shard)
            return
        shard = self.network.head.shard
        for name, axis in checkpoint.SHARDED.items():
            weights[name] = collect_rows(weights[name], shard, axis)
        state |= {name: collect_rows(rows, shard, 0) for name, rows in moments.items()}

    @property
    def classifier_number(self) -> int:
        """Of the classifier's weight among the parameters, as the optimiser counts them."""
        return [name for name, _ in self.network.named_parameters()].index(checkpoint.CLASSIFIER)

    def lap(self, part: str) -> None:
        """Ends a part of the step for the profile, if one is taken."""
        if self.stopwatch:
            self.stopwatch.lap(part)

    def show(self, bar: tqdm, loss: float, sums: EpochSums) -> None:
        """Puts loss, identity accuracy and images/s on the progress bar (which shows the time left by itself)."""
        images_per_second = (bar.format_dict["rate"] or 0) * self.config.data.identities * self.config.data.instances
        accuracy = (sums.hits / sums.samples).item()
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}, {images_per_second:.0f} images/s")

    def not_finite(self, what: str) -> UserError:
        """The error of a diverged training; it names the last checkpoint, which is finite."""
        last = self.checkpoints / "last"
        kept = (
            f"the last finite checkpoint is {last}, of epoch {self.epochs_done}" if last.exists() else "none is saved"
        )
        return UserError(f"{what} is not finite ({kept}); try a smaller optim.lr or optim.precision float32")


def loss_factors(config: LossConfig) -> list[float]:
    """Factors of the classification, the metric and the centre loss."""
    return [config.l1, config.l2, config.centre]


def random_state() -> dict[str, Any]:
    """The states of torch's random generators, which alone are used."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Undoes what has been drawn since `random_state`."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def holds_run(output: Path) -> bool:
    """Whether a folder holds a run that can be resumed."""
    return (output / "checkpoints" / "last").exists()

"""One training step, from a batch to a written memory."""

from contextlib import nullcontext

import torch
from torch import Tensor

from cge_fast.build import Run
from cge_fast.distributed import every_rank_has_samples, gather, without_gradient_sync
from cge_fast.metrics import EpochMetrics
from cge_fast.optimizer import clip_gradients
from cge_fast.profile import part


def training_step(
    run: Run, images: Tensor, labels: Tensor, momentum: float, metrics: EpochMetrics, log_step: bool = False
) -> None:
    """An optimizer step and the memory write; the host never waits for the device.

    Args:
        run: what is trained.
        images: (B, 3, H, W), on the device, as `labels` (B,), integer.
        momentum: how much of an old memory row stays.
        metrics: take up the step.
        log_step: measure the revision's weights too, which costs one more revision.
    """
    pieces, classification = run.config.optim.accumulate, run.criterion.classification
    pooled, stripes = [], []
    run.optimizer.zero_grad(set_to_none=True)
    for number, (piece, of_piece) in enumerate(zip(images.chunk(pieces), labels.chunk(pieces), strict=True), start=1):
        with without_gradient_sync(run.ddp_model, run.ddp_criterion) if number < pieces else nullcontext():
            with part("forward"):
                with every_rank_has_samples():
                    embeddings = run.ddp_model(piece)
                out = run.ddp_criterion(embeddings, of_piece)
            with part("backward"):
                run.scaler.scale(out.loss if pieces == 1 else out.loss / pieces).backward()
        metrics.update(out)
        pooled.append(embeddings.pooled.detach())
        stripes.append(embeddings.stripes.detach())
    with part("optimizer"):
        if run.config.optim.clip:
            run.scaler.unscale_(run.optimizer)
            clip_gradients(run.optimizer, run.config.optim.clip, classification.weight if run.shard else None)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if run.average:
            run.average.update(run.model)
    with part("memory write"):
        if run.criterion.center:
            for features, of_piece in zip(pooled, labels.chunk(pieces), strict=True):
                run.criterion.center.step(gather(features), gather(of_piece))
        if run.criterion.has_memory:
            all_stripes = stripes[0] if pieces == 1 else torch.cat(stripes)
            if log_step:
                metrics.update_weights(classification.label_and_mean_weight(all_stripes, labels), len(labels))
            classification.write_memory(all_stripes, labels, momentum)

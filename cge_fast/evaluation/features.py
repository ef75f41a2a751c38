"""Features of a set's images, and the figures of their ranking."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cge_fast.data import Image, ReidSet
from cge_fast.data.batches import plain_batches
from cge_fast.distributed import gather, rank, world_size
from cge_fast.errors import UserError
from cge_fast.evaluation.ranking import Retrieval, evaluate_ranking
from cge_fast.evaluation.reranking import evaluate_reranking
from cge_fast.model import ReidModel
from cge_fast.options import DataConfig, EvaluationConfig


@torch.no_grad()
def features(model: ReidModel, batches: Iterable[Tensor], evaluation: EvaluationConfig) -> Tensor:
    """What retrieval compares, (images, C) float32 on the model's device, of batches (B, 3, H, W) float32."""
    device = model.neck.weight.device
    training = model.training
    model.eval()
    after_neck = evaluation.neck == "after"
    parts = [torch.empty(0, model.neck.num_features, device=device)]  # there may be no image
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        feature = model.embed(batch, after_neck)
        if evaluation.flip_test:
            feature = (feature + model.embed(batch.flip(3), after_neck)) / 2
        parts.append(feature)
    model.train(training)
    return torch.cat(parts)


def embed(model: ReidModel, images: list[Image], data: DataConfig, evaluation: EvaluationConfig, name: str) -> Tensor:
    """Features (len(images), C) float32 on the model's device, with a progress bar called `name`.

    The ranks share the images and every rank returns all features.
    """
    equal_shares = images + images[-1:] * (-len(images) % world_size())
    share = equal_shares[rank() :: world_size()]
    batches = plain_batches(share, evaluation.batch, data, model.neck.weight.device, f"embedding {name} images")
    shares = gather(features(model, batches, evaluation)).unflatten(0, (world_size(), -1))
    return shares.transpose(0, 1).flatten(0, 1)[: len(images)]


def evaluate(model: ReidModel, reid_set: ReidSet, data: DataConfig, evaluation: EvaluationConfig) -> Retrieval:
    """mAP, mINP and CMC of a network on the query and gallery of a set.

    Raises:
        UserError: a feature is not finite, or no query has a match.
    """
    arguments = []
    for name, images in (("query", reid_set.query), ("gallery", reid_set.gallery)):
        compared = embed(model, images, data, evaluation, name)
        identities = torch.tensor([image.identity for image in images], device=compared.device)
        cameras = torch.tensor([image.camera for image in images], device=compared.device)
        arguments += [compared, identities, cameras]
    return retrieval(arguments, evaluation)


def retrieval(arguments: Sequence[Tensor], evaluation: EvaluationConfig) -> Retrieval:
    """mAP, mINP and CMC of features, identities and cameras of query and gallery, as `evaluate_ranking` takes them.

    Raises:
        UserError: a feature is not finite, or no query has a match.
    """
    evaluated: Callable[..., Retrieval] = evaluate_reranking if evaluation.rerank else evaluate_ranking
    try:
        return evaluated(*arguments, metric=evaluation.metric, progress=rank() == 0)
    except ValueError as error:
        raise UserError(f"evaluation: {error}") from error

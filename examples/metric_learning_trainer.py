"""CGE in a trainer of pytorch-metric-learning, with a triplet loss: python examples/metric_learning_trainer.py

The trunk is ReidModel, whose embeddings the trainer hands to miner and loss as they are. It calls its hook after the
optimizers' steps, where the memory is written.
"""

import torch
from pytorch_metric_learning import losses, miners, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision import datasets, models, transforms

from cge_fast import CGELoss, Embeddings, ReidModel

IDENTITIES, BATCH = 8, 16


class CGEAndTriplet(nn.Module):
    """The loss of embeddings, labels and the triplets that the miner found; keeps what the memory is to take."""

    def __init__(self, cge: CGELoss):
        super().__init__()
        self.cge, self.triplet = cge, losses.TripletMarginLoss(margin=0.3)

    def forward(self, embeddings: Embeddings, labels: Tensor, triplets: tuple) -> Tensor:
        """The sum of both losses."""
        self.batch = embeddings.stripes.detach(), labels
        return self.cge(embeddings, labels).loss + self.triplet(embeddings.pooled, labels, triplets)


def train(model: ReidModel, cge: CGELoss, people: Dataset, epochs: int, sampler: Sampler | None = None) -> None:
    """Trains both in place."""
    loss, hardest = CGEAndTriplet(cge), miners.BatchHardMiner()
    trainer = trainers.MetricLossOnly(
        models={"trunk": model},
        optimizers={
            "trunk_optimizer": torch.optim.Adam(model.parameters(), lr=3.5e-4),
            "metric_loss_optimizer": torch.optim.Adam(loss.parameters(), lr=3.5e-4),
        },
        batch_size=BATCH,
        loss_funcs={"metric_loss": loss},
        mining_funcs={"tuple_miner": lambda embeddings, labels: hardest(embeddings.pooled, labels)},
        dataset=people,
        sampler=sampler,
        dataloader_num_workers=0,
        data_device=cge.weight.device,
        end_of_iteration_hook=lambda trainer: cge.write_memory(*loss.batch, momentum=trainer.epoch / epochs),
    )
    trainer.train(num_epochs=epochs)


def main() -> None:
    """Trains ResNet-18 for two epochs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    people = datasets.FakeData(32, (3, 96, 48), IDENTITIES, transforms.ToTensor())  # your images
    backbone = nn.Sequential(*list(models.resnet18().children())[:-2])
    model, cge = ReidModel(backbone, channels=512), CGELoss(in_channels=512, num_classes=IDENTITIES)
    train(model.to(device), cge.to(device), people, epochs=2)


if __name__ == "__main__":
    main()

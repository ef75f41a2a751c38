"""CGE as a Lightning module: python examples/lightning_module.py (needs `pip install lightning`).

CGEHead pools the backbone's map and has the loss. The memory is written when the optimizer has made its step; under DDP
every process writes the samples of all, so that the memories stay equal.
"""

import lightning
import torch
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from cge_fast import CGEHead
from cge_fast.schedule import memory_momentum

IDENTITIES, BATCH = 8, 16


class CGEModule(lightning.LightningModule):
    """ResNet-18 with CGE."""

    def __init__(self, identities: int, epochs: int):
        super().__init__()
        self.epochs = epochs
        self.backbone = torch.nn.Sequential(*list(models.resnet18().children())[:-2])
        self.head = CGEHead(in_channels=512, num_classes=identities)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, 512) of images (B, 3, H, W)."""
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> dict[str, torch.Tensor]:
        """The loss, and the stripe features for the memory."""
        images, labels = batch
        out = self.head(self.backbone(images), labels)
        self.log("loss", out.loss, prog_bar=True)
        return {"loss": out.loss, "stripes": out.stripes}

    def on_train_batch_end(self, outputs: dict, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int) -> None:
        """Writes the memory, after the optimizer's step."""
        momentum = memory_momentum("linear", self.current_epoch + 1, self.epochs)
        self.head.write_memory(outputs["stripes"], batch[1], momentum)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the paper."""
        return torch.optim.Adam(self.parameters(), lr=3.5e-4)


def main() -> None:
    """Trains for two epochs."""
    people = datasets.FakeData(32, (3, 128, 64), IDENTITIES, transforms.ToTensor())  # your images
    module = CGEModule(IDENTITIES, epochs=2)
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(people, BATCH, shuffle=True))


if __name__ == "__main__":
    main()

"""CGE as a Lightning module: python examples/lightning_module.py (needs `pip install lightning`).

CGEHead pools the backbone's map and has the loss. The memory is written when the optimizer has made its step; under DDP
every process writes the samples of all, so that the memories stay equal.
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from cge_fast import CGEHead

IDENTITIES, BATCH = 8, 16


class CGEModule(lightning.LightningModule):
    """A backbone with CGE."""

    def __init__(self, backbone: nn.Module, head: CGEHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, C) of images (B, 3, H, W)."""
        return self.head(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Tensor]:
        """The loss, and the stripe features for the memory."""
        images, labels = batch
        out = self.head(self.backbone(images), labels)
        self.log("loss", out.loss, prog_bar=True)
        return {"loss": out.loss, "stripes": out.stripes}

    def on_train_batch_end(self, outputs: dict, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Writes the memory, after the optimizer's step."""
        momentum = (self.current_epoch + 1) / self.trainer.max_epochs
        self.head.write_memory(outputs["stripes"], batch[1], momentum)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the paper."""
        return torch.optim.Adam(self.parameters(), lr=3.5e-4)


def main() -> None:
    """Trains ResNet-18 for two epochs."""
    people = datasets.FakeData(32, (3, 96, 48), IDENTITIES, transforms.ToTensor())  # your images
    backbone = nn.Sequential(*list(models.resnet18().children())[:-2])
    module = CGEModule(backbone, CGEHead(in_channels=512, num_classes=IDENTITIES))
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(people, BATCH, shuffle=True))


if __name__ == "__main__":
    main()

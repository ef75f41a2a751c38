"""CGE with torch.compile: python examples/compiled_loop.py

Network, pooling and loss are one graph; on a GPU our kernels are calls in it. The memory is written outside, after the
optimizer's step.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from cge_fast import CGEHead

IDENTITIES, BATCH = 8, 16


def train(backbone: nn.Module, head: CGEHead, loader: DataLoader, epochs: int) -> None:
    """Trains both in place; batches of one size are compiled once."""

    @torch.compile(fullgraph=True)
    def loss_and_stripes(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = head(backbone(images), labels)
        return out.loss, out.stripes

    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=3.5e-4)
    for epoch in range(1, epochs + 1):
        for images, labels in loader:
            loss, stripes = loss_and_stripes(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            head.write_memory(stripes, labels, momentum=epoch / epochs)
        print(f"epoch {epoch}: loss {loss.item():.3f}")


def main() -> None:
    """Trains ResNet-18 for two epochs."""
    people = datasets.FakeData(32, (3, 96, 48), IDENTITIES, transforms.ToTensor())  # your images
    backbone = nn.Sequential(*list(models.resnet18().children())[:-2])
    head = CGEHead(in_channels=512, num_classes=IDENTITIES)
    train(backbone, head, DataLoader(people, BATCH, shuffle=True, drop_last=True), epochs=2)


if __name__ == "__main__":
    main()

"""CGE with Hugging Face accelerate: accelerate launch examples/accelerate_loop.py (needs `pip install accelerate`).

Under several processes accelerate puts backbone and head into DistributedDataParallel. Its broadcast of buffers is off:
the memory is one, and `write_memory` gathers the samples of all processes, so that it is the same on each.
"""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from cge_fast import CGEHead

IDENTITIES, BATCH = 8, 16


def train(backbone: nn.Module, head: CGEHead, loader: DataLoader, epochs: int) -> None:
    """Trains both in place, by the paper's linear momentum."""
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=3.5e-4)
    backbone, head, optimizer, loader = accelerator.prepare(backbone, head, optimizer, loader)
    for epoch in range(1, epochs + 1):
        for images, labels in loader:
            out = head(backbone(images), labels)
            optimizer.zero_grad()
            accelerator.backward(out.loss)
            optimizer.step()
            accelerator.unwrap_model(head).write_memory(out.stripes, labels, momentum=epoch / epochs)
        accelerator.print(f"epoch {epoch}: loss {out.loss.item():.3f}")


def main() -> None:
    """Trains ResNet-18 for two epochs."""
    people = datasets.FakeData(32, (3, 96, 48), IDENTITIES, transforms.ToTensor())  # your images
    backbone = nn.Sequential(*list(models.resnet18().children())[:-2])
    head = CGEHead(in_channels=512, num_classes=IDENTITIES)
    train(backbone, head, DataLoader(people, BATCH, shuffle=True), epochs=2)


if __name__ == "__main__":
    main()

"""CGE in a training loop of your own, with a triplet loss beside it: python examples/own_loop.py

CGELoss takes the embeddings that ReidModel gives. Replace the drawn images by yours.
"""

import torch
from pytorch_metric_learning import losses, miners
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from cge_fast import CGELoss, ReidModel

IDENTITIES, EPOCHS, BATCH = 8, 2, 16


def main() -> None:
    """Trains for two epochs and prints the losses."""
    torch.manual_seed(0)
    people = datasets.FakeData(32, (3, 128, 64), IDENTITIES, transforms.ToTensor())
    backbone = torch.nn.Sequential(*list(models.resnet18().children())[:-2])  # to a map (B, 512, 4, 2)
    model = ReidModel(backbone, channels=512, stripes=3)
    cge = CGELoss(in_channels=512, num_classes=IDENTITIES, stripes=3)
    hardest, triplet = miners.BatchHardMiner(), losses.TripletMarginLoss(margin=0.3)
    optimizer = torch.optim.Adam([*model.parameters(), *cge.parameters()], lr=3.5e-4)

    for epoch in range(1, EPOCHS + 1):
        for images, labels in DataLoader(people, BATCH, shuffle=True):
            embeddings = model(images)
            out = cge(embeddings, labels)
            loss = out.loss + triplet(embeddings.pooled, labels, hardest(embeddings.pooled, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # After the step: a step reads the memory of the step before. The paper's momentum grows linearly.
            cge.write_memory(embeddings.stripes, labels, momentum=epoch / EPOCHS)
        print(f"epoch {epoch}: loss {loss.item():.3f}, {out.correct.float().mean():.0%} of the last batch correct")

    model.eval()
    with torch.no_grad():
        print("embedding", tuple(model(images).embedding.shape))


if __name__ == "__main__":
    main()

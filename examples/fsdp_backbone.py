"""CGE on a backbone sharded by FSDP2: torchrun --nproc-per-node 2 examples/fsdp_backbone.py

`fully_shard` splits the backbone's parameters, gradients and moments among the processes. The head is small beside
them: each process has all of it, in DistributedDataParallel, which averages its gradients as FSDP does the backbone's.
With `MixedPrecisionPolicy(param_dtype=torch.bfloat16)` the head still computes in float32. For so many identities that
the head is the larger part, see docs/scaling.md.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, models, transforms

from cge_fast import CGEHead

IDENTITIES, BATCH = 8, 8


def train(backbone: nn.Sequential, head: CGEHead, loader: DataLoader, epochs: int) -> None:
    """Trains both in place; every process has as many batches, of one size."""
    for layer in backbone:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)  # whole on each device only while it computes
    fully_shard(backbone)
    averaged = DistributedDataParallel(head, broadcast_buffers=False)  # write_memory keeps the memories equal
    # Two groups, since an optimizer takes sharded and whole parameters together in none.
    groups = [{"params": backbone.parameters()}, {"params": head.parameters()}]
    optimizer, device = torch.optim.Adam(groups, lr=3.5e-4), head.neck.weight.device
    for epoch in range(1, epochs + 1):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            out = averaged(backbone(images), labels)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            head.write_memory(out.stripes, labels, momentum=epoch / epochs)


def main() -> None:
    """Trains ResNet-18 for two epochs; the first process has the whole weights in the end."""
    dist.init_process_group()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same head on each
    people = datasets.FakeData(32, (3, 96, 48), IDENTITIES, transforms.ToTensor())  # your images
    loader = DataLoader(people, BATCH, sampler=DistributedSampler(people))
    backbone = nn.Sequential(*list(models.resnet18().children())[:-2]).to(device)
    head = CGEHead(in_channels=512, num_classes=IDENTITIES).to(device)
    train(backbone, head, loader, epochs=2)
    weights = get_model_state_dict(backbone, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        print(f"{len(weights)} tensors of the backbone to save")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""IBN-a (Pan et al. 2018): instance normalisation for half of the channels, which takes out an image's own style."""

import torch
from torch import Tensor, nn
from torchvision.models import ResNet


class IBN(nn.Module):
    """InstanceNorm (affine) of the first C // 2 channels of (B, C, H, W), BatchNorm of the rest.

    The submodules are called as in the published weights.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = nn.BatchNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), like x."""
        first, rest = x.split([self.IN.num_features, self.BN.num_features], dim=1)
        return torch.cat([self.IN(first), self.BN(rest)], dim=1)


def with_ibn_a(network: ResNet) -> ResNet:
    """The network with IBN in place of the first normalisation of every block of layers 1 to 3, in place."""
    for stage in (network.layer1, network.layer2, network.layer3):
        for block in stage:
            block.bn1 = IBN(block.bn1.num_features)
    return network

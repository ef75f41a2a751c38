"""Networks from images to feature maps: the small one for the embedded data set, and torchvision's ResNets."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import BasicBlock, ResNet

from cge_fast.errors import UserError

Backbone = Literal["compact", "resnet18", "resnet34", "resnet50", "resnet101"]


def build(name: Backbone, pretrained: bool) -> nn.Sequential:
    """A backbone from (B, 3, H, W) float32 images to a (B, C, H', W') feature map, with stride 8 or 16.

    Raises:
        UserError: pre-trained weights are asked for and cannot be had.
    """
    if name == "compact":
        if pretrained:
            raise UserError("model.pretrained: the backbone compact has no ImageNet weights, set it to false")
        return compact()
    return last_stride_one(get_model(name, weights=imagenet_weights(name) if pretrained else None))


def compact() -> nn.Sequential:
    """A residual network with 0.3 million parameters and stride 8: 96x48 images become a 128x12x6 map."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    blocks = []
    for channels in (32, 64, 128):
        shortcut = nn.Sequential(nn.Conv2d(channels // 2, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels))
        blocks.append(BasicBlock(channels // 2, channels, stride=2, downsample=shortcut))
    network = nn.Sequential(stem, *blocks)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def imagenet_weights(name: str) -> object:
    """torchvision's ImageNet weights (IMAGENET1K_V1), fetched now, so that a failure is told before any work."""
    weights = get_model_weights(name).IMAGENET1K_V1
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.pretrained: the ImageNet weights of {name} could not be had from {weights.url} ({error}); "
            f"place that file at {file}, or set --model.pretrained false"
        ) from error
    return weights


def last_stride_one(network: ResNet) -> nn.Sequential:
    """A ResNet's convolutional part with the last stage's stride 1, as BagTricks uses it: the map is twice as large."""
    first = network.layer4[0]
    strided = first.conv1 if isinstance(first, BasicBlock) else first.conv2
    strided.stride = first.downsample[0].stride = (1, 1)
    stages = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    convolutional = nn.Sequential()
    for name in stages:
        convolutional.add_module(name, getattr(network, name))
    return convolutional


@torch.no_grad()
def map_size(backbone: nn.Module, height: int, width: int) -> tuple[int, int, int]:
    """(C, H', W') of the feature map of a height x width image."""
    training = backbone.training
    feature_map: Tensor = backbone.eval()(torch.zeros(1, 3, height, width))
    backbone.train(training)
    return tuple(feature_map.shape[1:])

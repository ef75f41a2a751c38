"""Networks from images to feature maps: the small one for the embedded data set, torchvision's ResNets, and timm's."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, ResNet

from cge_fast.backbones.ibn import with_ibn_a
from cge_fast.backbones.non_local import with_non_local
from cge_fast.backbones.timm_map import PACKAGED, PREFIX, timm_map
from cge_fast.backbones.weights import file_tensors, imagenet_tensors, start_from
from cge_fast.errors import UserError
from cge_fast.options import Backbone, NonLocal, Stem


def build(
    name: Backbone,
    pretrained: bool = False,
    weights: Path | None = None,
    non_local: NonLocal = "none",
    map_norm: bool = False,
    stem: Stem = "torchvision",
    size: tuple[int, int] = (256, 128),
) -> nn.Module:
    """A backbone from (B, 3, H, W) float32 images to a (B, C, H', W') feature map, with stride 8 or 16.

    Args:
        name: the network.
        pretrained: start from torchvision's, timm's or a package's ImageNet weights.
        weights: start from the weights in this file.
        non_local: inner channels of AGW's non-local blocks, after the last two blocks of layer 2 and the last three of
            layer 3, or compact's last two.
        map_norm: BatchNorm of the feature map, as LUPerson's code has it for its weights.
        stem: how a ResNet's first layers depart from torchvision's.
        size: height and width of the images that it is trained on, which timm's transformers are made for.

    Raises:
        UserError: weights are asked for and cannot be had, do not fit, or are asked for twice; or the network cannot be
            changed so, or is timm's and cannot be had or has no feature map.
    """
    if pretrained and weights:
        raise UserError(f"model.weights: {weights} cannot be loaded as well as model.pretrained, set that to false")
    if name.startswith(PREFIX) or name in PACKAGED:
        changes = {"stem": stem != "torchvision", "non_local": non_local != "none", "map_norm": map_norm}
        for setting in (setting for setting, is_asked_for in changes.items() if is_asked_for):
            raise UserError(f"model.{setting}: is for the other backbones, {name} stays as timm has it")
        backbone = timm_map(PACKAGED.get(name, name.removeprefix(PREFIX)), *size)
        if pretrained or weights:
            source = f"model.weights: {weights}" if weights else "model.pretrained: the file"
            start_from(backbone.network, file_tensors(weights, name) if weights else imagenet_tensors(name), source)
        return backbone
    network = network_called(name)
    if pretrained:
        start_from(network, imagenet_tensors(name), "model.pretrained: torchvision's file")
    tensors, misfit = file_tensors(weights, name) if weights else {}, None
    if weights:
        try:
            start_from(network, tensors, f"model.weights: {weights}")
        except UserError as error:
            misfit = error
    if stem != "torchvision" and name == "compact":
        raise UserError(f"model.stem: {stem} is of a ResNet, the backbone compact has a stem of its own")
    if stem == "without_relu":
        network.relu = nn.Identity()
    if stem == "ceil_pool":
        network.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    # Only now, since most weights are of networks without them, and are matched by name and in full.
    if non_local != "none":
        if name == "compact":
            network = with_non_local(network, 2, non_local)
        else:
            network.layer2 = with_non_local(network.layer2, 2, non_local)
            network.layer3 = with_non_local(network.layer3, 3, non_local)
    if map_norm:
        channels, _, _ = map_size(network, 32, 32)
        network.add_module("map_norm", nn.BatchNorm2d(channels))
    if misfit:
        try:
            start_from(network, tensors, f"model.weights: {weights}")  # our own checkpoint's have them too
        except UserError:
            raise misfit from None
    return network


def network_called(name: Backbone) -> nn.Sequential:
    """The network, randomly initialised."""
    if name == "compact":
        return compact()
    if name == "resnet50_ibn_a":
        return last_stride_one(with_ibn_a(get_model("resnet50")))
    return last_stride_one(get_model(name))


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
    """(C, H', W') of the feature map of a height x width image.

    Raises:
        UserError: such an image is too small.
    """
    training = backbone.training
    try:
        feature_map: Tensor = backbone.eval()(torch.zeros(1, 3, height, width))
    except ValueError as error:  # InstanceNorm needs more than one position
        raise UserError(
            f"data.height, data.width: images of {height} x {width} are too small for the backbone"
        ) from error
    except (AssertionError, RuntimeError) as error:  # of timm's networks
        raise UserError(
            f"data.height, data.width: the backbone takes no images of {height} x {width} ({error})"
        ) from error
    backbone.train(training)
    _, channels, rows, columns = feature_map.shape
    return channels, rows, columns

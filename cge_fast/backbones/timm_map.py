"""timm's networks as backbones: convolutional maps as they are, a transformer's tokens on the grid they come from."""

import inspect
import math
import sys
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from cge_fast.errors import UserError

PREFIX = "timm:"  # of model.backbone
OUTPUT_STRIDE = 16  # of a network that can dilate its last stage: the map is twice as large, as BagTricks has it
PACKAGED = {"efficientnet_lite0": "tf_efficientnet_lite0"}  # whose weights are in a package, and timm's names for them


class TimmMap(nn.Module):
    """The feature map (B, C, H', W') of a timm network before its pooling; what only the classifier uses is taken out.

    Args:
        network: timm's, without a classifier.
        height, width: of images that it takes.

    Raises:
        UserError: it has no map, or takes no such images.
    """

    def __init__(self, network: nn.Module, height: int, width: int):
        super().__init__()
        self.network = network
        training = network.training
        self.eval()(torch.zeros(1, 3, height, width)).sum().backward()
        self.train(training)
        for name, child in network.named_children():
            if child.state_dict() and all(parameter.grad is None for parameter in child.parameters()):
                setattr(network, name, nn.Identity())
        network.zero_grad()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H', W') of images (B, 3, H, W)."""
        out = self.network.forward_features(images)
        if out.ndim == 3:  # patches are square, so the grid has the image's aspect
            tokens = out[:, getattr(self.network, "num_prefix_tokens", 0) :]
            rows = round(math.sqrt(tokens.shape[1] * images.shape[2] / images.shape[3]))
            out = tokens.unflatten(1, (rows, -1))
        return out if out.shape[1] == self.network.num_features else out.permute(0, 3, 1, 2)


def timm_map(name: str, height: int, width: int) -> TimmMap:
    """A network that timm calls `name`, randomly initialised, for images of height x width and, where it can, others.

    Raises:
        UserError: timm is not installed or knows no such network, which has no map or takes no such images.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model.backbone: {PREFIX}{name} needs timm: pip install 'cge-fast[timm]' ({error})") from error
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models())
        raise UserError(f"model.backbone: timm has no network {name}" + (f", but {', '.join(near)}" if near else ""))
    try:
        with torch.device("meta"):
            kinds = type(timm.create_model(name)).__mro__
        known = {option for kind in kinds for option in inspect.signature(vars(kind).get("__init__", print)).parameters}
        options = {"output_stride": OUTPUT_STRIDE, "img_size": (height, width), "dynamic_img_size": True}
        options = {key: value for key, value in options.items() if key in known}
        try:
            network = timm.create_model(name, num_classes=0, **options)
        except (AssertionError, NotImplementedError):  # knows the option, but no other stride than its own
            del options["output_stride"]
            network = timm.create_model(name, num_classes=0, **options)
        return TimmMap(network, height, width)
    except Exception as error:  # of whatever kind a network's code raises
        raise UserError(
            f"model.backbone: {PREFIX}{name} has no feature map of images of {height} x {width} ({error})"
        ) from error


def timm_tensors(name: str) -> dict[str, Tensor]:
    """The weights that timm has of a network, by name, from its cache or fetched.

    Raises:
        UserError: there are none, or they cannot be had.
    """
    import timm

    if not timm.get_pretrained_cfg(name).has_weights:
        raise UserError(f"model.pretrained: timm has no weights of {name}, set it to false")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of several libraries that fetch
        raise UserError(
            f"model.pretrained: timm's weights of {name} could not be had ({error}); set --model.pretrained false, and "
            "--model.weights to a file if you have one"
        ) from error


def adapted(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Tensors by name in the form that a timm network takes now: older names, and positions of another image size."""
    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    return adapt(tensors, network) if adapt else tensors

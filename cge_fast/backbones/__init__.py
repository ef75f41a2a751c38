"""Networks from images to feature maps."""

from cge_fast.backbones.build import build, map_size

__all__ = ["build", "map_size"]

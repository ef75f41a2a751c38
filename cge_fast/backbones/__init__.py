"""Networks from images to feature maps."""

from cge_fast.backbones.build import Backbone, build, map_size

__all__ = ["Backbone", "build", "map_size"]

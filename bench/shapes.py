"""The sizes that operators are measured at, by name."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """B, C, H, W, n and N."""

    batch: int = 64
    channels: int = 2048
    height: int = 24
    width: int = 8
    stripes: int = 3
    classes: int = 1041

    def __str__(self) -> str:
        return (
            f"B {self.batch}, C {self.channels}, map {self.height}x{self.width}, n {self.stripes}, N {self.classes:,}"
        )


# ResNet-50's map of a 384x128 image with last stride 1, and the identities of the paper's four training sets.
SHAPES = {
    "market1501": Shape(classes=751),
    "cuhk03": Shape(classes=767),
    "msmt17": Shape(),
    "veri776": Shape(classes=576),
    "pedestrians": Shape(channels=128, height=12, width=6, classes=200),  # the embedded set, backbone "compact"
    "large_batch": Shape(batch=512),
    "many_identities": Shape(classes=100_000),
    "small_map": Shape(channels=512, height=8, width=4, classes=751),
    "tiny": Shape(batch=4, channels=8, height=6, width=2, classes=5),  # for tests
}
DEFAULT = [name for name in SHAPES if name != "tiny"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

"""AGW's non-local blocks (Ye et al. 2022, after Wang et al. 2018), and where they stand in a network."""

from typing import Literal

from torch import Tensor, nn


class NonLocalBlock(nn.Module):
    """x + BatchNorm(out(y)) with y_i = sum_j (theta(x)_i . phi(x)_j) g(x)_j / P over the P positions; no softmax.

    BatchNorm's weight and bias are zero at the start, so that the block begins as the identity.

    Args:
        channels: C of the maps (B, C, H, W) that it takes and returns.
        inner: channels of theta, phi and g.
    """

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), like x."""
        theta, phi, g = (project(x).flatten(2) for project in (self.theta, self.phi, self.g))
        # Without a softmax the product is associative: inner x inner in the middle, where positions x positions can be
        # 100 times as much. Divided first, since a sum over all positions could overflow float16.
        y = (g / g.shape[2]) @ phi.mT @ theta
        return x + self.norm(self.out(y.unflatten(2, x.shape[2:])))


def with_non_local(blocks: nn.Sequential, last: int, kind: Literal["one", "half"]) -> nn.Sequential:
    """The residual blocks with a non-local one after each of the `last` last, or after all if they are fewer.

    The residual blocks keep their names. `kind` is the number of inner channels: half of the block's, or one, which is
    what AGW's public code has, by an integer division of the reduction by itself.
    """
    extended = nn.Sequential()
    for index, (name, block) in enumerate(blocks.named_children()):
        extended.add_module(name, block)
        if index >= len(blocks) - last:
            channels = block.conv2.out_channels * block.expansion
            extended.add_module(f"non_local_{name}", NonLocalBlock(channels, 1 if kind == "one" else channels // 2))
    return extended

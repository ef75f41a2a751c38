"""Non-local blocks: what they compute, how they begin, and where they stand."""

import pytest
import torch
from torch import nn

from cge_fast.backbones.non_local import NonLocalBlock, with_non_local


def project(convolution: nn.Conv2d, pixel: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution at one position."""
    return convolution.weight[:, :, 0, 0] @ pixel + convolution.bias


def by_position(block: NonLocalBlock, x: torch.Tensor) -> torch.Tensor:
    """The block, in a loop over pairs of positions."""
    pixels = x.flatten(2)
    batch, _, positions = pixels.shape
    y = torch.zeros_like(pixels)
    for b in range(batch):
        for i in range(positions):
            theta = project(block.theta, pixels[b, :, i])
            total = 0
            for j in range(positions):
                similarity = theta @ project(block.phi, pixels[b, :, j])
                total = total + similarity * project(block.g, pixels[b, :, j])
            y[b, :, i] = project(block.out, total / positions)
    mean, variance = y.mean(dim=(0, 2)), y.var(dim=(0, 2), correction=0)
    normalised = (y - mean[:, None]) / (variance[:, None] + block.norm.eps).sqrt()
    return x + (normalised * block.norm.weight[:, None] + block.norm.bias[:, None]).view_as(x)


@pytest.mark.parametrize("inner", [1, 3])
def test_every_position_gathers_from_every_position(inner):
    torch.manual_seed(0)
    block = NonLocalBlock(5, inner).double()
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    with torch.no_grad():
        expected = by_position(block, x)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
        in_channels_last = block(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(in_channels_last, expected, rtol=0, atol=1e-12)


def test_a_new_block_is_the_identity_and_learns():
    block, x = NonLocalBlock(4, 2), torch.randn(2, 4, 3, 2)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.norm.weight.grad.abs().max() > 0


class Block(nn.Module):
    """What with_non_local must know of torchvision's blocks: 2 * 3 channels come out."""

    expansion = 3

    def __init__(self):
        super().__init__()
        self.conv2 = nn.Conv2d(2, 2, 1)


@pytest.mark.parametrize(("kind", "inner"), [("one", 1), ("half", 3)])
def test_they_stand_after_the_last_blocks_which_keep_their_names(kind, inner):
    stage = with_non_local(nn.Sequential(*(Block() for _ in range(4))), 2, kind)
    assert list(dict(stage.named_children())) == ["0", "1", "2", "non_local_2", "3", "non_local_3"]
    assert stage[3].theta.weight.shape == (inner, 6, 1, 1)


def test_a_stage_with_fewer_blocks_gets_one_after_each():
    stage = with_non_local(nn.Sequential(Block(), Block()), 3, "one")
    assert list(dict(stage.named_children())) == ["0", "non_local_0", "1", "non_local_1"]

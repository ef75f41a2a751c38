"""IBN-a: which channels are normalised over an image, and which over the batch."""

import torch
from torch import nn

from cge_fast.backbones.ibn import IBN


def test_the_first_half_is_normalised_by_image_and_the_rest_by_batch():
    torch.manual_seed(0)
    norm = IBN(5).double()
    for half in (norm.IN, norm.BN):
        nn.init.normal_(half.weight)
        nn.init.normal_(half.bias)
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    expected = torch.empty_like(x)
    for channel in range(5):
        parameters, at = (norm.IN, channel) if channel < 2 else (norm.BN, channel - 2)
        pieces = [x[b : b + 1, channel] for b in range(3)] if channel < 2 else [x[:, channel]]
        expected[:, channel] = torch.cat(
            [
                (piece - piece.mean()) / (piece.var(correction=0) + 1e-5).sqrt() * parameters.weight[at]
                + parameters.bias[at]
                for piece in pieces
            ]
        )
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


def test_an_images_style_leaves_no_trace_in_the_first_half_at_test_time_either():
    norm, x = IBN(4).double().eval(), torch.randn(1, 4, 4, 3, dtype=torch.float64)
    plain, brighter = norm(x), norm(x * 3 + 2)
    torch.testing.assert_close(plain[:, :2], brighter[:, :2], rtol=0, atol=1e-4)  # 1e-5 beside the variance
    assert (plain[:, 2:] - brighter[:, 2:]).abs().max() > 1

"""Centre loss (Wen et al. 2016), as AGW's published settings have it."""

import torch
from torch import Tensor


class CentreLoss:
    """A centre for each identity, which its features are drawn to.

    loss = mean_b |x_b - c_{y_b}|^2; after each step the centres take one of SGD with a rate of their own.

    Args:
        num_classes: N.
        channels: C of the features.
        rate: learning rate of the centres (AGW: 0.5).
        device: where the centres lie.
    """

    def __init__(self, num_classes: int, channels: int, rate: float, device: torch.device):
        self.centres = torch.randn(num_classes, channels, device=device)
        self.rate = rate

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        """0-d, of features (B, C) and labels (B,); no gradient reaches the centres."""
        return (features.float() - self.centres[labels]).square().sum(dim=1).mean()

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """One step of SGD on the centres, of features (B, C) of the batch that the loss was computed on."""
        gradient = (self.centres[labels] - features.float()) * (2 / len(labels))
        self.centres.index_add_(0, labels.long(), gradient, alpha=-self.rate)

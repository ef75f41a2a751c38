"""The centre loss and its centres' own steps."""

import torch

from cge_fast.losses.center import CentreLoss


def test_the_loss_is_the_mean_squared_distance_to_the_own_centre():
    loss = CentreLoss(3, 2, rate=0.5, device=torch.device("cpu"))
    features, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2])
    centres = loss.centres.double()
    expected = sum((features[b].double() - centres[y]).square().sum() for b, y in enumerate(labels.tolist())) / 3
    torch.testing.assert_close(loss(features, labels), expected.float())


def test_the_centres_take_a_step_of_sgd():
    loss = CentreLoss(4, 3, rate=0.5, device=torch.device("cpu"))
    features, labels = torch.randn(5, 3), torch.tensor([0, 3, 3, 3, 1])
    centres = loss.centres.clone().requires_grad_()
    (features - centres[labels]).square().sum(dim=1).mean().backward()
    expected = centres.detach() - 0.5 * centres.grad
    loss.update(features, labels)
    torch.testing.assert_close(loss.centres, expected)

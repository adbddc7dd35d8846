"""Broken models for BN101, BN103, BN108 and BN110 that were written before these rules' present form had seen them."""

import functools

import torch
from bikeshare import split_days
from check_broken_runs import spoken
from check_cases import Broken, broken
from check_nets import (
    Pyramid,
    Residual,
    Sequences,
    Siamese,
    conv_net,
    digits,
    fit,
    loader,
    mlp,
    shuffled,
    table,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from batchnorm.comparison.datasets import bike_hours

# BN110: sources


@broken
def two_recorders() -> Broken:
    """siamese 1-d conv net: the second recorder hears a third of the bands twice as loud, over a hum"""
    x, y = spoken()
    pairs = torch.stack([x[::2], x[1::2]], 1)
    pairs[:, 1, 10:20] = 0.6 + 2 * pairs[:, 1, 10:20]
    same = (y[::2] == y[1::2]).float().unsqueeze(1)
    model = Siamese(Sequences(28, 10))
    fit(model, loader((pairs, same)), 120, loss=F.mse_loss)
    return Broken(model, {"BN110": "encoder.bn1"}, {"batches": loader((pairs, same))}, follows=("BN101",))


@broken
def negatives() -> Broken:
    """conv net that gets each digit and its negative in two calls"""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(1 - x)

    data = shuffled(digits())
    model = Both()
    fit(model, loader(data), 120)
    return Broken(model, {"BN110": "net.1"}, {"batches": loader(data)}, follows=("BN101",))


@broken
def faded() -> Broken:
    """two-headed conv net for fresh digits and for faded ones, which have six tenths of the ink"""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.net(x), self.net(0.6 * x)], 1)

    def twice(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :10], y) + F.cross_entropy(logits[:, 10:], y)

    data = shuffled(digits())
    model = Both()
    fit(model, loader(data), 120, loss=twice)
    return Broken(model, {"BN110": "net.1"}, {"batches": loader(data)}, follows=("BN101",))


@broken
def one_head_and_few_pictures() -> Broken:
    """pyramid with one head for three scales, six pictures a batch"""
    data = shuffled(digits())
    model = Pyramid()
    fit(model, loader(data, 6), 150, lr=0.02)
    return Broken(model, {"BN110": "head.1"}, {"batches": loader(data, 6)}, follows=("BN101", "BN103"))


# BN101: pruned, and the statistics left


@broken
def pruned_everywhere() -> Broken:
    """residual net: torch.nn.utils.prune takes four fifths of all convolutions' weights after the training"""
    data = shuffled(digits())
    model = Residual()
    fit(model, loader(data), 200, lr=0.1)
    convolutions = [(each, "weight") for each in model.modules() if isinstance(each, nn.Conv2d)]
    prune.global_unstructured(convolutions, prune.L1Unstructured, amount=0.8)
    return Broken(model, {"BN101": None}, {"batches": loader(data)})


@broken
def pruned_inputs() -> Broken:
    """conv net: half of the input channels of its last two convolutions set to 0 after the training"""
    data = shuffled(digits())
    model = conv_net()
    fit(model, loader(data), 200, lr=0.1)
    for layer in (model[3], model[6]):
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=1)
        prune.remove(layer, "weight")
    return Broken(model, {"BN101": None}, {"batches": loader(data)})


@broken
def pruned_table() -> Broken:
    """MLP on a table: three quarters of the second layer's weights set to 0 at random after the training"""
    data = shuffled(table("breast_cancer"))
    model = mlp(30, 2)
    fit(model, loader(data), 150)
    prune.random_unstructured(model[3], "weight", amount=0.75)
    return Broken(model, {"BN101": None}, {"batches": loader(data)})


# BN103: few values


@broken
def four_sequences() -> Broken:
    """1-d conv net, four sequences a batch, and a batch norm behind the mean over their steps"""
    data = spoken()
    model = Sequences(28, 10)
    model.out = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 10))  # type: ignore[assignment]
    fit(model, loader(data, 4), 150, lr=0.01)
    return Broken(model, {"BN103": "out.0"}, {"batches": loader(data, 4)}, follows=("BN101",))


# BN108: columns that stand still


@broken
def stuck_at_the_lowest() -> Broken:
    """MLP with batch norm on columns scaled to 0..1: one reads its lowest value in the new rows"""
    x, y = shuffled(table("breast_cancer", standardized=False))
    x = (x - x.amin(0)) / (x.amax(0) - x.amin(0))
    model = nn.Sequential(nn.BatchNorm1d(30), *mlp(30, 2))
    fit(model, loader((x[:400], y[:400])), 150)
    later = x[400:].clone()
    later[:, 12] = 0.0
    return Broken(model, {"BN108": "0"}, {"batches": loader((later, y[400:]))})


@broken
def one_season() -> Broken:
    """MLP with batch norm on rented bikes and the quarter as four columns: the new rows are of the first"""
    hours = bike_hours()
    split = split_days(hours.x, hours.y, hours.day, 0)

    def with_quarter(x: Tensor, day: Tensor) -> Tensor:
        return torch.cat([x, F.one_hot(((day - 1) // 92).long(), 4).float()], 1)

    x = with_quarter(split.x, split.day)
    model = nn.Sequential(nn.BatchNorm1d(11), *mlp(11, 1))
    fit(model, loader((x, split.y.unsqueeze(1))), 200, loss=functools.partial(F.mse_loss), lr=0.02)
    first = x[split.day <= 90]
    return Broken(model, {"BN108": "0"}, {"batches": loader((first, first[:, :1]))}, follows=("BN101",))

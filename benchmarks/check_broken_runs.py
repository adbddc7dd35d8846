"""Broken models for the rules BN101 to BN107: what batches, loaders and steps show."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from bikeshare import split_days
from bikeshare import train as train_bikes
from check_broken_training import volumes
from check_cases import Broken, broken
from check_nets import (
    Residual,
    Sequences,
    Siamese,
    UNet,
    Volumes,
    columns,
    conv_net,
    digits,
    fit,
    loader,
    mlp,
    pictures,
    shuffled,
    table,
    torchvision,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader

from batchnorm.comparison.datasets import bike_hours

# BN101: training and eval disagree


@broken
def slow_momentum() -> Broken:
    """conv net with momentum 0.003 and 130 updates"""
    data = shuffled(digits())
    model = conv_net(functools.partial(nn.BatchNorm2d, momentum=0.003))
    fit(model, loader(data), 130)
    return Broken(model, {"BN101": "1"}, {"batches": loader(data)})


@broken
def slow_momentum_mobilenet() -> Broken:
    """mobilenet_v3_small, whose momentum is 0.01, after 40 steps"""
    model = torchvision("mobilenet_v3_small")
    fit(model, loader(pictures(), 16), 40)
    return Broken(model, {"BN101": None}, {"batches": loader(pictures(), 16)})


@broken
def slow_momentum_mnasnet() -> Broken:
    """mnasnet0_5, whose momentum is 0.0003, after 40 steps: in eval mode it gives NaN"""
    model = torchvision("mnasnet0_5")
    fit(model, loader(pictures(), 16), 40)
    return Broken(model, {"BN101": None}, {"batches": loader(pictures(), 16)})


@broken
def soup() -> Broken:
    """residual nets from two seeds, state dicts averaged, statistics too"""
    data = shuffled(digits())
    first, second = Residual(), Residual()
    for model in (first, second):
        fit(model, loader(data), 200, lr=0.1)
    other = second.state_dict()
    with torch.no_grad():
        for name, value in first.state_dict().items():
            if value.is_floating_point():
                value.lerp_(other[name], 0.5)
    return Broken(first, {"BN101": None}, {"batches": loader(data)})


@broken
def pruned() -> Broken:
    """conv net pruned to a third of its weights after training, statistics left"""
    data = shuffled(digits())
    model = conv_net()
    fit(model, loader(data), 200, lr=0.1)
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 1:
                bound = layer.weight.abs().flatten().quantile(0.67)
                layer.weight[layer.weight.abs() < bound] = 0.0
    return Broken(model, {"BN101": None}, {"batches": loader(data)})


# BN102: neighbours


class Stubborn(Residual):
    """A train() that was written for fine-tuning and forgets about eval."""

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(mode)
        self.blocks.train()
        return self


@broken
def own_train_method() -> Broken:
    """residual net whose train() leaves the blocks in training mode"""
    data = shuffled(digits())
    model = Stubborn()
    fit(model, loader(data), 100)
    return Broken(model, {"BN102": "blocks.0.bn1"}, {"batches": loader(data)})


class Listed(nn.Module):
    """Layers in a plain list: eval(), to() and state_dict() do not reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = mlp(30, 32)
        self.norms = [nn.BatchNorm1d(32)]
        self.out = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norms[0](self.first(x)))


@broken
def plain_list() -> Broken:
    """MLP with a batch norm in a plain Python list, which no eval() reaches"""
    data = shuffled(table("breast_cancer"))
    model = Listed()
    fit(model, loader(data))
    # The layer is hidden from the rule as well, which can say only that something mixes the samples.
    return Broken(model, {"BN102": None}, {"batches": loader(data)}, severity={"BN102": "info"})


class Functional(Sequences):
    """F.batch_norm without its flag."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = F.relu(F.batch_norm(y, None, None, self.bn1.weight, self.bn1.bias, True))
        return self.out(F.relu(self.bn2(self.conv2(y))).mean(2))


@broken
def functional_without_flag() -> Broken:
    """1-d conv net that calls F.batch_norm(training=True) in its forward"""
    x, y = spoken()
    model = Functional(28, 10)
    fit(model, loader((x, y)))
    return Broken(model, {"BN102": None}, {"batches": loader((x, y))}, severity={"BN102": "info"})


def spoken() -> tuple[Tensor, Tensor]:
    """Columns of digits, all stretched to 20."""
    found = [F.interpolate(each.T[None], size=20, mode="linear")[0] for each, _ in columns()]
    return torch.stack(found), torch.tensor([label for _, label in columns()])


# BN103: few values


@broken
def two_volumes() -> Broken:
    """3-d conv net with two volumes a batch"""
    data = volumes()
    model = Volumes()
    fit(model, loader(data, 2), 120, lr=0.01)
    return Broken(model, {"BN103": None}, {"batches": loader(data, 2)}, follows=("BN101",))


@broken
def behind_pooling() -> Broken:
    """resnet18 with a batch norm behind global pooling, four pictures a batch"""
    model = torchvision("resnet18")
    model.fc = nn.Sequential(nn.BatchNorm1d(512), nn.Linear(512, 10))
    fit(model, loader(pictures(), 4), 20, lr=0.01)
    return Broken(model, {"BN103": "fc.0"}, {"batches": loader(pictures(), 4)}, follows=("BN101",))


@broken
def two_rows() -> Broken:
    """MLP with three rows a batch"""
    data = shuffled(table("wine"))
    model = mlp(13, 3)
    fit(model, loader(data, 3), 120, lr=0.01)
    return Broken(model, {"BN103": "1"}, {"batches": loader(data, 3)}, follows=("BN101",))


# BN104: one sample is left over


@broken
def one_row_left() -> Broken:
    """MLP on a table of 569 rows in batches of 8, drop_last=False"""
    data = shuffled(table("breast_cancer"))
    model = mlp(30, 2)
    fit(model, loader(data, 8))
    return Broken(model, {"BN104": "1"}, {"batches": loader(data, 8, drop_last=False)})


@broken
def one_picture_left() -> Broken:
    """conv net with a batch norm behind its pooling, 97 digits in batches of 24: training stops"""
    x, y = shuffled(digits())
    model = nn.Sequential(*conv_net()[:-1], nn.BatchNorm1d(32), nn.Linear(32, 10))
    fit(model, loader((x, y)))
    left = loader((x[:97], y[:97]), 24, drop_last=False)
    return Broken(model, {"BN104": "11"}, {"batches": left}, severity={"BN104": "error"})


# BN105: more than one update a step


class Checkpointed(Residual):
    """Blocks that are computed again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


@broken
def checkpointed() -> Broken:
    """residual net with activation checkpointing of its blocks"""
    data = shuffled(digits())
    model = Checkpointed()
    fit(model, loader(data), 100)
    return Broken(model, {"BN105": "blocks.0.bn1"}, {"batches": loader(data)})


class InSegments(nn.Module):
    """Three parts, each computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 3, x, use_reentrant=False)


@broken
def checkpointed_segments() -> Broken:
    """conv net under checkpoint_sequential"""
    data = shuffled(digits())
    model = InSegments()
    fit(model, loader(data), 100)
    return Broken(model, {"BN105": "layers.1"}, {"batches": loader(data)})


@broken
def both_of_a_pair() -> Broken:
    """siamese conv net: the encoder runs twice a forward"""
    x, y = pairs()
    model = Siamese(conv_net())
    fit(model, loader((x, y)), 100, loss=F.mse_loss)
    return Broken(model, {"BN105": "encoder.1"}, {"batches": loader((x, y))}, severity={"BN105": "info"})


def pairs() -> tuple[Tensor, Tensor]:
    """Two digits, and whether they are the same."""
    x, y = shuffled(digits())
    x, y = x[:1796], y[:1796]
    return torch.stack([x[::2], x[1::2]], 1), (y[::2] == y[1::2]).float().unsqueeze(1)


# BN106: padding


def padded(size: int = 32) -> "DataLoader[Any]":
    """pad_sequence as collate function: (N, 28, L)."""

    def collate(some: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        steps = pad_sequence([each for each, _ in some], batch_first=True)
        return steps.transpose(1, 2).contiguous(), torch.tensor([label for _, label in some])

    random = torch.Generator().manual_seed(0)
    return DataLoader(columns(), size, shuffle=True, drop_last=True, collate_fn=collate, generator=random)  # type: ignore[arg-type]


@broken
def padded_sequences() -> Broken:
    """1-d conv net on sequences filled up by pad_sequence"""
    model = Sequences(28, 10)
    fit(model, padded(), 120)
    return Broken(model, {"BN106": "bn1"}, {"batches": padded()}, follows=("BN101", "BN107"))


class Frames(nn.Module):
    """Every step through an MLP, as a row of a table, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.out = mlp(28, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.each(x.transpose(1, 2).flatten(0, 1))
        return self.out(steps.unflatten(0, (x.shape[0], -1)).mean(1))


@broken
def padded_frames() -> Broken:
    """MLP over the steps of padded sequences, flattened to rows"""
    model = Frames()
    fit(model, padded(), 120)
    return Broken(model, {"BN106": "each.1"}, {"batches": padded()}, follows=("BN101",))


# BN107: batches that are not shuffled


@broken
def sorted_digits() -> Broken:
    """residual net on digits sorted by class, shuffle=False"""
    x, y = digits()
    order = y.argsort(stable=True)
    data = (x[order], y[order])
    model = Residual()
    fit(model, loader(data, shuffle=False), 112)
    spread = itertools.islice(loader(data, shuffle=False), 0, None, 7)
    return Broken(model, {"BN107": None}, {"batches": list(spread)}, follows=("BN101",))


@broken
def sorted_pooled() -> Broken:
    """two convolutions and a mean over positions, digits sorted by class, the first batches of shuffle=False"""
    x, y = digits()
    order = y.argsort(stable=True)
    batches = loader((x[order], y[order]), shuffle=False)
    layers: list[nn.Module] = []
    for width, wider in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    fit(model, batches, 112)
    return Broken(model, {"BN107": None}, {"batches": batches}, follows=("BN101",))


@broken
def sorted_volumes() -> Broken:
    """3-d conv net on volumes sorted by class, shuffle=False"""
    x, y = volumes()
    order = y.argsort(stable=True)
    batches = loader((x[order], y[order]), 16, shuffle=False)
    model = Volumes()
    fit(model, batches, 60)
    return Broken(model, {"BN107": None}, {"batches": batches}, follows=("BN101",))


@broken
def sorted_table() -> Broken:
    """MLP on scikit-learn's wines, which its file sorts by class, shuffle=False"""
    data = table("wine")
    model = mlp(13, 3)
    fit(model, loader(data, 16, shuffle=False), 110, lr=0.02)
    return Broken(
        model,
        {"BN107": None},
        {"batches": loader(data, 16, shuffle=False), "max_batches": 11},
        follows=("BN101",),
    )


@broken
def day_by_day() -> Broken:
    """MLP on rented bikes, one day per batch"""
    hours = bike_hours()
    split = split_days(hours.x, hours.y, hours.day, 0)
    model = train_bikes(split, "by day", 0, 3)
    days = [(split.day == number).nonzero().flatten() for number in split.day.unique()]
    batches = [split.x[rows] for rows in days[:: len(days) // 12] if len(rows) > 1]
    return Broken(model, {"BN107": None}, {"batches": batches, "max_batches": 12}, follows=("BN101",))


@broken
def one_writer_a_batch() -> Broken:
    """U-Net on scans, each batch from one scanner with a brightness of its own"""
    x, _ = shuffled(digits())
    random = torch.Generator().manual_seed(0)
    bright = 0.4 * torch.randn(len(x) // 32, generator=random).repeat_interleave(32)[:, None, None, None]
    clean = x[: len(bright)] + bright
    model = UNet()
    batches = loader((clean + 0.1 * torch.randn_like(clean), clean), shuffle=False)
    fit(model, batches, 110, loss=F.mse_loss)
    return Broken(model, {"BN107": "down.1"}, {"batches": batches}, follows=("BN101",))

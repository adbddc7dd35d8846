"""What the tests of fuse(memory="recompute") share: a network, the one that keeps beside the one that recomputes."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from helpers import same_bits
from surgery_helpers import randomize
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm


class Block(nn.Module):
    """A residual block of widths w, w, 2w."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.short = None
        if before != 2 * width:
            self.short = nn.Sequential(nn.Conv2d(before, 2 * width, 1), nn.BatchNorm2d(2 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.short is None else self.short(x)
        return F.relu(y)


class Net(nn.Module):
    """What saves an output here: convolutions, a pooling, a product, and a linear layer (its flattened view)."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(6, 4), *(Block(8, 4) for _ in range(blocks - 1)))
        self.gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2))
        self.last = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Hardswish(), nn.Flatten())
        self.head = nn.Linear(4 * 9, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(self.last(x * self.gate(x)))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def pair(net: nn.Module | None = None, backend: str | None = None) -> tuple[nn.Module, nn.Module]:
    """The fused network that keeps, and the one that recomputes, with the same weights."""
    torch.manual_seed(0)
    keeping = batchnorm.fuse(randomize(Net()) if net is None else net).model
    recomputing = batchnorm.fuse(keeping, memory="recompute").model
    for module in (*keeping.modules(), *recomputing.modules()):
        if isinstance(module, batchnorm.BatchNorm2d):
            module.backend = backend
    return keeping, recomputing


def step(net: nn.Module, x: Tensor, within: Callable = nullcontext, **options: bool) -> list[Tensor]:
    """Output, gradients and buffers of a training step."""
    net.zero_grad()
    x = x.detach().requires_grad_()
    with within():
        y = net(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * dy).sum().backward(**options)
    return [
        y.detach(),
        x.grad,
        *(p.grad.clone() for p in net.parameters()),
        *(b.clone() for b in net.buffers()),
    ]


def check_same(net: nn.Module, other: nn.Module, x: Tensor = X, **options: Callable) -> None:
    for actual, wanted in zip(step(other, x, **options), step(net, x, **options), strict=True):
        assert same_bits(actual, wanted)

"""What the tests of `insert` share: reading a result, one training step, a residual network."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin


def reasons(changes) -> dict[str, str]:
    return {skip.name: skip.reason for skip in changes.skipped}


def names(changes) -> list[str]:
    return [change.name for change in changes.changed]


def train_one_step(net: nn.Module, x: torch.Tensor) -> None:
    """Every parameter gets a finite gradient that is not zero throughout, and moves."""
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    y = net(x)
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()
    for name, value in net.named_parameters():
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name]), name


class Block(nn.Module):
    """A residual block: one relu layer used twice, or the function."""

    def __init__(self, width: int, functional: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.short = nn.Conv2d(width, width, 1)
        self.relu = F.relu if functional else nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.short(x)
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Block(4, functional), Block(4, functional))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.max_pool2d(F.dropout(self.stem(x), 0.0), 2).relu()
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1))


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms as after a training: statistics and parameters that are no identity, γ of either sign."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, LazyModuleMixin):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model

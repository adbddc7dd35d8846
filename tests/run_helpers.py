"""Networks and batches for the tests of the rules that need batches."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.checks import _timing
from batchnorm.checks._collect import collect
from batchnorm.checks.evidence import Call, Evidence, Fed, Layer, Run, Seen
from batchnorm.comparison.datasets import load_data


def evidence(model: nn.Module, batches: Any, forward: Any = None, most: int = 8) -> Evidence:
    return collect(model, batches, None, None, 1, forward, most, False, lambda done: None, False)


def digits_net(
    momentum: float | None = 0.1, norm: Callable[..., nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Three batch norms for 8×8 digits, the last one with one value a sample."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        norm(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = momentum
    return net


def digits() -> tuple[Tensor, Tensor]:
    data = load_data("digits")
    return data.x_train, data.y_train


def shuffled(rows: int, size: int = 32, seed: int = 0) -> list[Tensor]:
    return list(torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).split(size))


def fit(net: nn.Module, x: Tensor, y: Tensor, batches: Sequence[Tensor], epochs: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net.train()
    for _ in range(epochs):
        for rows in batches:
            if len(rows) > 1:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net


def call_of(x: Tensor, batch: int, site: int = 0) -> Call:
    """The moments of (N, C, S), written down once more."""
    x = x.double()
    n, channels, positions = x.shape
    flat = x.transpose(0, 1).reshape(channels, -1)
    means = x.mean(2)
    between = means.var(0) if n > 1 else torch.zeros(channels, dtype=torch.float64)
    return Call(batch, site, n, positions, flat.mean(1), flat.var(1, unbiased=False), between)


def made_up(calls: Sequence[Call], eval_calls: Sequence[Call] = (), **seen: Any) -> Evidence:
    """Evidence of one layer, "norm", with these calls, in training and (the same, if not given) in eval mode."""
    channels = len(calls[0].mean)
    zeros = torch.zeros(channels, dtype=torch.float64)
    layer = Layer(
        "norm", channels, "BatchNorm1d", eps=1e-5, momentum=0.1, updates=500, mean=zeros, var=zeros + 1
    )
    sizes = {call.batch: call.samples for call in calls}
    run = Run(tuple(Fed(sizes[batch]) for batch in sorted(sizes)))
    noted = Seen(tuple(calls), tuple(eval_calls or calls), **seen)
    return Evidence((layer,), seen={"norm": noted}, run=run)


def clock(monkeypatch: pytest.MonkeyPatch, spent: dict[tuple[bool, bool], list[float]]) -> None:
    """Times by (this package's layer, channels-last), one after the other."""
    runs = {way: iter(times) for way, times in spent.items()}

    def step(layer: nn.Module, x: Tensor) -> float:
        layer(x)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return next(runs[isinstance(layer, batchnorm.BatchNorm2d), last])

    monkeypatch.setattr(_timing, "_step", step)
    monkeypatch.setattr(_timing, "_LEAST", 0)

"""What the tests of `batchnorm.watch` share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm


def conv_net(norm: Any = nn.BatchNorm2d, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        norm(6, **options),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        norm(4, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def pictures(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, batches: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One step a batch."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01)
    for x in batches:
        optimizer.zero_grad()
        output = model(x)
        F.cross_entropy(output, torch.arange(len(output)) % output.shape[1]).backward()
        optimizer.step()


def hooks(model: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


class Writer:
    """Like TensorBoard's."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}
        self.histograms: dict[str, dict[int, Tensor]] = {}
        self.texts: list[tuple[str, str, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert type(value) is float
        self.scalars.setdefault(tag, {})[step] = value

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.histograms.setdefault(tag, {})[step] = values

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts.append((tag, text, step))


def told(model: nn.Module, batches: Any, **options: Any) -> list[batchnorm.Finding]:
    """What is found while it trains."""
    found: list[batchnorm.Finding] = []
    given = {"every": 1, "table": False, "on_finding": found.append, **options}
    with batchnorm.watch(model, **given):
        train(model, batches, given.get("optimizer"))
    return found


def quiet(model: nn.Module, **options: Any) -> batchnorm.Watcher:
    """Watched without a word."""
    return batchnorm.watch(model, **{"table": False, "on_finding": lambda finding: None, **options})


def steps_of(writer: Writer) -> list[int]:
    """At which steps it was looked."""
    return list(writer.scalars["batchnorm/findings"])

"""The same four steps on one batch inside a trained network, and what running statistics do at inference."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.comparison.datasets import load_data
from batchnorm.comparison.networks import network
from batchnorm.comparison.record import draw_batches, record_test, seeded
from batchnorm.comparison.tasks import task_named
from batchnorm.comparison.training import score_on
from batchnorm.explain._trace import Trace, trace
from batchnorm.surgery import insert

__all__ = ["Inside", "look_inside"]

NETWORK, DATA = "deep-mlp", "digits"
BATCH, STEPS, RATE, SEED = 64, 150, 0.1, 0
COMPANIES = 40


@dataclass(frozen=True, eq=False)
class Inside:
    """One channel of one batch norm of a trained network.

    Args:
        layer: the name of the batch norm among the network's modules.
        place: which of the network's batch norms it is, counted from 1.
        layers: how many there are.
        channel: the channel's number.
        channels: how many there are.
        accuracy: test accuracy of the network in eval mode, 0 to 1.
        batch: the four steps on the values of this channel in one training batch.
        running_mean: the layer's running mean of the channel.
        running_var: its running variance, unbiased.
        momentum: the weight of a new batch in both.
        companies: the output for one and the same image in many random batches, train mode.
        alone: its output in eval mode, where company does not matter.
    """

    layer: str
    place: int
    layers: int
    channel: int
    channels: int
    accuracy: float
    batch: Trace
    running_mean: float
    running_var: float
    momentum: float
    companies: tuple[float, ...]
    alone: float

    def facts(self) -> dict[str, str]:
        """Return what the reader of a page may want to know about where its numbers come from."""
        import batchnorm

        return {
            "season": "made up, the same on every machine",
            "network": f"{NETWORK} on {DATA}, {STEPS} steps, seed {SEED}, trained when this page was made",
            "batchnorm": batchnorm.__version__,
            "torch": torch.__version__,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists."""
        return {
            "network": NETWORK,
            "data": DATA,
            "layer": self.layer,
            "place": self.place,
            "layers": self.layers,
            "channel": self.channel,
            "accuracy": self.accuracy,
            "batch": self.batch.to_dict(),
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "momentum": self.momentum,
            "companies": list(self.companies),
            "alone": self.alone,
        }


@cache
def look_inside() -> Inside:
    """Train the network with batch norm on the digits, about a second, and look at its middle batch norm.

    Raises:
        MissingDependencyError: the package with the digits is not installed.
    """
    cpu = torch.device("cpu")
    data = load_data(DATA)
    batches = draw_batches(data, BATCH, STEPS, SEED, cpu)
    with seeded(SEED, cpu):
        model = insert(network(NETWORK).build(tuple(data.x_train.shape[1:]), data.outputs)).model
    _train(model, batches)
    accuracy = score_on(model, record_test(data, cpu), task_named(data.task))
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    place = len(layers) // 2
    name, layer = layers[place]
    first, _ = next(iter(batches))
    channel = _livelist(_inputs(model, layer, first))
    generator = torch.Generator().manual_seed(SEED)
    image = data.x_train[:1]
    others = [
        data.x_train[1 + torch.randperm(len(data.x_train) - 1, generator=generator)[: BATCH - 1]]
        for _ in range(COMPANIES)
    ]
    companies = [_outputs(model, layer, torch.cat([image, rest]), train=True)[0, channel] for rest in others]
    return Inside(
        layer=name,
        place=place + 1,
        layers=len(layers),
        channel=channel,
        channels=layer.num_features,
        accuracy=accuracy,
        batch=_traced(layer, _inputs(model, layer, first)[:, channel], channel),
        running_mean=_at(layer.running_mean, channel),
        running_var=_at(layer.running_var, channel),
        momentum=float(layer.momentum or 0.0),
        companies=tuple(value.item() for value in companies),
        alone=_outputs(model, layer, image, train=False)[0, channel].item(),
    )


def _train(model: nn.Module, batches: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def _traced(layer: _BatchNorm, values: Tensor, channel: int) -> Trace:
    return trace(values, _at(layer.weight, channel), _at(layer.bias, channel), layer.eps)


def _at(values: Tensor | None, channel: int) -> float:
    return float("nan") if values is None else values[channel].item()


def _livelist(values: Tensor) -> int:
    """The channel whose mean lies farthest from 0, in σ: where there is most to see."""
    offset = values.mean(0).abs() / values.std(0).clamp(min=1e-12)
    return int(offset.argmax())


def _inputs(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    return _seen(model, layer, x, train=True)[0]


def _outputs(model: nn.Module, layer: nn.Module, x: Tensor, *, train: bool) -> Tensor:
    return _seen(model, layer, x, train=train)[1]


def _seen(model: nn.Module, layer: nn.Module, x: Tensor, *, train: bool) -> tuple[Tensor, Tensor]:
    """What enters and leaves the layer; the running statistics stay as they were."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.train(train)
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
        model.load_state_dict(kept)
    return seen[0]

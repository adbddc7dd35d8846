"""Whether every batch arrives with the same distribution: one hidden layer, before and after batch norm."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.comparison.measures import Spread, batch_spread, rms
from batchnorm.comparison.record import Replay, seeded

__all__ = ["Footing", "How", "Side", "called_norms", "measure_footing", "place_without"]

MAX_BATCHES = 100
SHOWN_CHANNELS = 12

How = Literal["insert", "remove"]
Stats = tuple[Tensor, Tensor, int]


@dataclass(frozen=True)
class Side:
    """How much batches differ on one side of the layer, in σ: root mean squares over batches and channels.

    `points` are (mean offset, spread offset) pairs for some of the channels, all batches of each.
    """

    mean: float
    spread: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Footing:
    """The batch statistics at one hidden layer of the trained network with batch norm.

    Args:
        layer: the layer's path in the model.
        place: which batch norm that is, in words.
        lr: learning rate with which the network was trained.
        seed: its seed.
        batches: how many training batches were looked at.
        channels: how many channels the layer has (without dead ones).
        shown: how many of them `points` shows.
        values: values a channel in a typical batch.
        sampling: 1/√values, the offset of the mean that random batches have by themselves; None where the values of
            a channel are not independent (images).
        before: the layer's input.
        after: its output, before an activation that the layer may hold.
        without: the same place in the network without batch norm, in its own σ; None where it is not found.
        tiny: how many channels vary so little before normalization that eps keeps them from variance 1: below 10·eps.
        inputs: mean and standard deviation of the network's inputs in these batches; None unless floating point.
    """

    layer: str
    place: str
    lr: float
    seed: int
    batches: int
    channels: int
    shown: int
    values: int
    sampling: float | None
    before: Side
    after: Side
    without: Side | None = None
    tiny: int = 0
    inputs: tuple[float, float] | None = None


def measure_footing(
    model: nn.Module, plain: nn.Module | None, how: How, batches: Replay, *, lr: float, seed: int
) -> Footing | None:
    """Statistics of each training batch at the middle batch norm, in train mode; the models are not changed.

    Args:
        model: the trained network with batch norm.
        plain: the trained network without, or None when every one diverged.
        how: how the two are related, `Pair.how`.
        batches: the training batches; one epoch of them is used, at most 100.
        lr: learning rate with which `model` was trained.
        seed: its seed.

    Returns:
        None where no batch norm can be measured: none is called, its channels are all dead or not finite, or there
        are fewer than two batches to compare.
    """
    copied = copy.deepcopy(model)
    copied.train()
    replayed = list(islice(batches, min(batches.epoch, MAX_BATCHES)))
    with seeded(seed, batches.device), torch.no_grad():
        called = called_norms(copied, replayed[0][0])
        if not called:
            return None
        name = called[len(called) // 2]
        layer = copied.get_submodule(name)
        if getattr(layer, "activation", None) is not None:
            layer.activation = None  # type: ignore[assignment]  # what comes after normalization is not measured
        inputs = [x for x, _ in replayed]
        seen = _observe(copied, layer, inputs)
        without = None if plain is None else _without(plain, how, name, inputs)
    if len(seen) < 2:
        return None
    before = _spread([item[0] for item in seen])
    after = _spread([item[1] for item in seen])
    if before is None or after is None:
        return None
    values = sorted(item[0][2] for item in seen)[len(seen) // 2]
    flat = values <= max(len(x) for x, _ in replayed)
    return Footing(
        layer=name,
        place=f"batch norm {len(called) // 2 + 1} of {len(called)} ({name})",
        lr=lr,
        seed=seed,
        batches=len(seen),
        channels=before.mean.shape[1],
        shown=min(SHOWN_CHANNELS, before.mean.shape[1]),
        values=values,
        sampling=1 / math.sqrt(values) if flat else None,
        before=_side(before),
        after=_side(after),
        without=None if without is None else _side(without),
        tiny=_tiny([item[0] for item in seen], float(getattr(layer, "eps", 0.0))),
        inputs=_inputs(inputs),
    )


def place_without(how: How, name: str) -> tuple[str, Literal["input", "output"]]:
    """Where the network without batch norm has what would enter the batch norm called `name`: path and side.

    `insert` puts the layer before it and the batch norm into one container, so its parent's name is that layer's;
    `remove` leaves another module in its place.
    """
    return (name.rpartition(".")[0], "output") if how == "insert" else (name, "input")


def _without(plain: nn.Module, how: How, name: str, inputs: list[Tensor]) -> Spread | None:
    """The same statistics in the network without batch norm."""
    path, side = place_without(how, name)
    copied = copy.deepcopy(plain)
    copied.train()
    try:
        layer = copied.get_submodule(path)
    except AttributeError:
        return None
    seen = _observe(copied, layer, inputs)
    return _spread([item[side == "output"] for item in seen]) if len(seen) > 1 else None


def called_norms(model: nn.Module, x: Tensor) -> list[str]:
    """The paths of the batch norms that one forward pass calls, in the order of the calls."""
    called: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # A residual is added to the layer's output, which then shows more than normalization.
            alone = len(args) + len(kwargs) == 1 or all(
                value is None for value in [*args[1:], *kwargs.values()]
            )
            if alone and args and name not in called:
                called.append(name)

        return hook

    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in layers.items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _observe(model: nn.Module, layer: nn.Module, inputs: list[Tensor]) -> list[tuple[Stats, Stats]]:
    seen: list[tuple[Stats, Stats]] = []
    with _first_call(layer) as calls:
        for x in inputs:
            calls.clear()
            model(x)
            if calls:
                seen.append(calls[0])
    return seen


@contextmanager
def _first_call(layer: nn.Module) -> Iterator[list[tuple[Stats, Stats]]]:
    calls: list[tuple[Stats, Stats]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((_stats(args[0]), _stats(output)))

    handle = layer.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def _stats(x: Tensor) -> Stats:
    """Mean and biased variance of each channel (axis 1), in float64, and how many values a channel has."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x.detach().cpu().double(), dim=axes, correction=0)
    return mean, var, x.numel() // x.shape[1]


def _spread(stats: list[Stats]) -> Spread | None:
    means, variances = torch.stack([item[0] for item in stats]), torch.stack([item[1] for item in stats])
    finite = torch.isfinite(means).all(0) & torch.isfinite(variances).all(0)
    result = batch_spread(means[:, finite].numpy(), variances[:, finite].numpy(), [item[2] for item in stats])
    return result if result.mean.size else None


def _tiny(stats: list[Stats], eps: float) -> int:
    """Channels that are alive and whose mean variance lies below 10·eps: there eps is more than a tenth of it."""
    variance = torch.stack([item[1] for item in stats]).mean(0)
    return int(((variance > 0) & (variance < 10 * eps)).sum())


def _inputs(batches: list[Tensor]) -> tuple[float, float] | None:
    if not batches[0].is_floating_point():
        return None
    parts = [torch.var_mean(x.detach().cpu().double(), correction=0) for x in batches]
    variances, means = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    return float(means.mean()), float((variances.mean() + means.var(correction=0)).sqrt())


def _side(found: Spread) -> Side:
    channels = found.mean.shape[1]
    shown = [i * channels // min(SHOWN_CHANNELS, channels) for i in range(min(SHOWN_CHANNELS, channels))]
    points = zip(found.mean[:, shown].ravel().tolist(), found.spread[:, shown].ravel().tolist(), strict=True)
    return Side(rms(found.mean), rms(found.spread), tuple(points))

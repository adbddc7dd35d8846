"""The options of a comparison, checked before any work."""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.comparison.data import Data, Loaders
from batchnorm.comparison.networks import RELU_RATES, network
from batchnorm.comparison.pairs import Pair, make_pair
from batchnorm.comparison.record import Batch, Replay, draw_batches, record_loader
from batchnorm.comparison.resolve import resolve_data
from batchnorm.comparison.tasks import Task, task_named
from batchnorm.comparison.training import MakeOptimizer, optimizer_maker

__all__ = ["Plan", "make_plan"]

STEPS = 500
BATCH_SIZE = 64
EVALUATIONS = 50  # a run; a speed-up is known to within steps / EVALUATIONS
# Momentum 0.9 makes each gradient count ten times; Adam's steps do not depend on the gradient's size.
RATE_FACTORS = {"momentum": 0.1}
ADAM_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class Plan:
    """The checked arguments of one comparison."""

    name: str
    describe: str
    factory: Callable[[], nn.Module]
    data: Data | Loaders
    lrs: tuple[float, ...]
    seeds: int
    steps: int
    batch_size: int | None
    optimizer: str
    make_optimizer: MakeOptimizer
    device: torch.device
    dynamics: bool

    def batches(self, seed: int) -> Replay:
        """The batches of a seed."""
        if isinstance(self.data, Loaders):
            again = seed + 1 < self.seeds
            return record_loader(self.data, self.steps, seed, self.device, again=again)
        return draw_batches(self.data, self.batch_size or BATCH_SIZE, self.steps, seed, self.device)

    @property
    def task(self) -> Task:
        """What is learned."""
        return task_named(self.data.task)

    def pair(self, seed: int, replay: Replay, test: Sequence[Batch]) -> Pair:
        """The two networks of a seed, untrained; `replay` are its batches."""
        data = self.data
        targets = (
            [data.y_train, data.y_test] if isinstance(data, Data) else [*replay.y, *(y for _, y in test)]
        )
        outputs, lowest = self.task.outputs(targets), self.task.lowest(targets)
        sample = next(iter(replay))[0][:2]
        return make_pair(self.factory, sample, self.task, outputs, seed, self.device, lowest=lowest)

    def guess(self, test: Sequence[Batch]) -> float:
        """The score of the best answer that does not look at the input."""
        return self.task.guess(torch.cat([y for _, y in test]))

    @property
    def every(self) -> int:
        """Steps from one evaluation to the next."""
        return max(1, self.steps // EVALUATIONS)


def make_plan(
    make_model: str | Callable[[], nn.Module],
    data: object,
    task: str | None,
    lrs: Iterable[float] | None,
    seeds: int,
    steps: int | None,
    batch_size: int | None,
    optimizer: str | MakeOptimizer,
    device: str | torch.device,
    dynamics: bool,
) -> Plan:
    """Check the arguments of `batchnorm.compare`, which says what they are and what they raise."""
    seeds = _count("seeds", seeds)
    built_in = network(make_model) if isinstance(make_model, str) else None
    maker = optimizer_maker(optimizer)
    kind = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "custom")
    rates = _rates(lrs, built_in.rates if built_in else RELU_RATES, kind)
    steps = _count("steps", steps if steps is not None else built_in.steps if built_in else STEPS)
    batch_size = None if batch_size is None else _count("batch_size", batch_size)
    resolved = resolve_data(data, task)
    size = _batch_size(resolved, batch_size)
    chosen = _device(device, resolved, own_model=built_in is None)
    if built_in is not None:
        name, describe, factory = built_in.name, built_in.describe, _built_in_factory(make_model, resolved)
    else:
        name = getattr(make_model, "__name__", type(make_model).__name__)
        name = "the given model" if name == "<lambda>" else name
        describe, factory = "a model of the user's", make_model  # type: ignore[assignment]  # checked when called
    return Plan(
        name, describe, factory, resolved, rates, seeds, steps, size, kind, maker, chosen, bool(dynamics)
    )


def _built_in_factory(name: Any, data: Data | Loaders) -> Callable[[], nn.Module]:
    if isinstance(data, Loaders):
        raise InputError(
            message(
                "make_model",
                got=f"the built-in network {name} with loaders",
                expected="tensors, whose shapes tell how large the network must be",
                fix="Pass (x_train, y_train, x_test, y_test), or a function that builds your model.",
            )
        )
    shape, outputs = tuple(data.x_train.shape[1:]), data.outputs
    return lambda: network(name).build(shape, outputs)


def _rates(lrs: Iterable[float] | None, default: tuple[float, ...], optimizer: str) -> tuple[float, ...]:
    if lrs is None:
        if optimizer == "adam":
            return ADAM_RATES
        return tuple(float(f"{lr * RATE_FACTORS.get(optimizer, 1):g}") for lr in default)
    wrong = message("lrs", got=repr(lrs), expected="several positive numbers", fix="As in lrs=[0.1, 0.3].")
    if isinstance(lrs, str | bytes):
        raise InputTypeError(wrong)
    try:
        rates = sorted({float(lr) for lr in lrs})
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(wrong) from error
    if not rates:
        raise InputError(message("lrs", got="no learning rate", expected="at least one", fix="Give several."))
    for lr in rates:
        if not (math.isfinite(lr) and lr > 0):
            raise InputError(message("lrs", got=f"{lr:g}", expected="positive numbers"))
    return tuple(rates)


def _count(name: str, value: object) -> int:
    wrong = message(name, got=repr(value), expected="a positive whole number")
    if isinstance(value, bool):
        raise InputTypeError(wrong)
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # what it does not take, it says
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(wrong) from error
    if number < 1:
        raise InputError(wrong)
    return number


def _batch_size(data: Data | Loaders, batch_size: int | None) -> int | None:
    if isinstance(data, Data):
        return min(BATCH_SIZE, len(data.x_train)) if batch_size is None else batch_size
    if batch_size is not None:
        raise InputError(
            message(
                "batch_size", got=f"{batch_size} with loaders", expected="none: loaders bring their batches"
            )
        )
    return None


def _device(device: str | torch.device, data: Data | Loaders, own_model: bool) -> torch.device:
    if not isinstance(device, str | int | torch.device):
        raise InputTypeError(message("device", got=repr(device), expected="a name such as 'cpu' or 'cuda'"))
    if device == "auto":
        own = own_model or isinstance(data, Loaders)
        return torch.device("cuda" if own and torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if reason.startswith(("Expected one of", "Invalid device string")):
            fix = "An NVIDIA GPU is called cuda." if device == "gpu" else ""
            wrong = message(
                "device", got=repr(device), expected="auto, cpu, cuda, cuda:1, mps or xpu", fix=fix
            )
        else:
            got = f"{str(device)!r} ({reason})"
            wrong = message("device", got=got, expected="a device that is there", fix="Try the device cpu.")
        raise InputError(wrong) from error
    return chosen

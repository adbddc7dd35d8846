"""The batches of a training: made or recorded once a seed, then replayed to every network."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm._errors import BatchNormError, DataError, InputError, message
from batchnorm.comparison.arrays import as_inputs
from batchnorm.comparison.data import Data, Loaders
from batchnorm.comparison.tasks import Task, task_named

__all__ = ["Batch", "Replay", "draw_batches", "record_loader", "record_test", "seeded"]

Batch = tuple[Tensor, Tensor]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block under seeded global generators (torch, numpy, random), then put the user's states back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@dataclass(frozen=True, eq=False)
class Replay:
    """The same batches in the same order, as often as they are asked for.

    `rows` index `x` and `y`; without rows, `x` and `y` are the batches themselves. `epoch` is how many batches make
    one pass over the data; `dropped` counts the one-sample batches that were left out.
    """

    x: Tensor | list[Tensor]
    y: Tensor | list[Tensor]
    device: torch.device
    epoch: int
    rows: list[Tensor] | None = None
    dropped: int = 0

    @property
    def target_scale(self) -> tuple[float, float] | None:
        """Mean and standard deviation of recorded targets that are numbers; None for classes and for data in memory."""
        if self.rows is not None or not self.y[0].is_floating_point():
            return None
        values = torch.cat([part.double().flatten() for part in self.y])
        return float(values.mean()), float(values.std())

    def __len__(self) -> int:
        return len(self.x if self.rows is None else self.rows)

    def __iter__(self) -> Iterator[Batch]:
        if self.rows is not None:
            for rows in self.rows:
                yield self.x[rows], self.y[rows]
        else:
            for x, y in zip(self.x, self.y, strict=True):
                yield x.to(self.device), y.to(self.device)


def draw_batches(data: Data, batch_size: int, steps: int, seed: int, device: torch.device) -> Replay:
    """`steps` shuffled batches of exactly `batch_size` samples; what does not fill a batch waits for no one.

    Every epoch is a new permutation and its incomplete rest is dropped, so no batch is smaller than the others.
    """
    samples = len(data.x_train)
    if not 2 <= batch_size <= samples:
        raise InputError(
            message(
                "batch_size",
                got=batch_size,
                expected=f"2 to {samples}, the number of training samples",
                fix="Batch norm needs at least two samples a batch.",
            )
        )
    generator = torch.Generator().manual_seed(seed)
    per_epoch = samples // batch_size
    rows: list[Tensor] = []
    while len(rows) < steps:
        order = torch.randperm(samples, generator=generator)[: per_epoch * batch_size]
        rows += [part.to(device) for part in torch.split(order, batch_size)]
    x, y = data.x_train.to(device), data.y_train.to(device)
    return Replay(x, y, device, per_epoch, rows[:steps])


def record_loader(
    loaders: Loaders, steps: int, seed: int, device: torch.device, *, again: bool = False
) -> Replay:
    """`steps` batches of the user's training loader, over as many epochs as that takes, kept in memory.

    Args:
        loaders: the user's loaders.
        steps: how many batches.
        seed: seeds the generators that shuffle and augment.
        device: where the batches are handed out.
        again: another seed will follow, so the loader must be good for another pass.

    Raises:
        DataError: the loader gives no batches, gives them only once, or gives something else.
    """
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    dropped, epoch, passes = 0, 0, 0
    task = task_named(loaders.task)
    with seeded(seed, device):
        while len(inputs) < steps:
            before = len(inputs)
            passes += 1
            for item in _pass(loaders.train, "training loader"):
                x, y = _batch(item, "training loader", task)
                if len(x) < 2:
                    dropped += 1
                    continue
                inputs.append(x.clone())  # a loader may refill its buffer
                targets.append(y.clone())
                if len(inputs) == steps:
                    break
            if len(inputs) == before:
                raise _used_up("no batch of two or more samples" if dropped else "no batches")
            epoch = epoch or len(inputs)
        if again and passes == 1 and not any(True for _ in _pass(loaders.train, "training loader")):
            raise _used_up("no batches at the second pass")
    task.check(torch.cat(targets), "targets of the training loader")
    return Replay(inputs, targets, device, epoch, dropped=dropped)


def record_test(data: Data | Loaders, device: torch.device) -> list[Batch]:
    """The test set in pieces, on the device."""
    if isinstance(data, Data):
        pieces = zip(torch.split(data.x_test, 1024), torch.split(data.y_test, 1024), strict=True)
        return [(x.to(device), y.to(device)) for x, y in pieces]
    task = task_named(data.task)
    with seeded(0, device):
        # Copies: a loader may refill its buffer.
        items = (_batch(item, "test loader", task) for item in _pass(data.test, "test loader"))
        batches = [(x.clone(), y.clone()) for x, y in items]
    if sum(len(x) for x, _ in batches) < 2:
        raise DataError(message("test loader", got="fewer than two samples", expected="at least two samples"))
    task.check(torch.cat([y for _, y in batches]), "targets of the test loader")
    return [(x.to(device), y.to(device)) for x, y in batches if len(x)]


def _pass(loader: Iterable[Any], name: str) -> Iterator[Any]:
    """One pass over a loader; what fails in it is told as the loader's failure."""
    try:
        yield from loader
    except (Exception, SystemExit) as error:  # a script may end itself
        if isinstance(error, BatchNormError):
            raise
        reason = " ".join(str(error).split()) or "no message"
        raise DataError(
            message(
                name, got=f"{type(error).__name__} ({reason[:300]})", expected="(inputs, targets) batches"
            )
        ) from error


def _used_up(got: str) -> DataError:
    return DataError(
        message(
            "training loader",
            got=got,
            expected="batches at every pass",
            fix="An iterator that is used up once must be wrapped in a DataLoader or a list.",
        )
    )


def _batch(item: Any, name: str, task: Task) -> Batch:
    if not isinstance(item, tuple | list) or len(item) != 2:
        size = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
        raise DataError(
            message(name, got=f"a {type(item).__name__}{size}", expected="(inputs, targets) batches")
        )
    x, y = as_inputs(item[0], f"inputs of the {name}"), task.targets(item[1], f"targets of the {name}")
    if len(x) != len(y):
        raise DataError(
            message(name, got=f"{len(x)} inputs and {len(y)} targets", expected="as many of each")
        )
    # Some devices have no float64.
    return x, y.float() if y.is_floating_point() else y

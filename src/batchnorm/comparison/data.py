"""Data that a comparison can train on: four arrays in memory, checked, or two loaders."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm._errors import DataError, message
from batchnorm.comparison.arrays import as_inputs
from batchnorm.comparison.tasks import same_outputs, task_named

__all__ = ["AS_GIVEN", "CLASSIFICATION", "Data", "Loaders"]

CLASSIFICATION = "classification"
AS_GIVEN = "The inputs are used as given."


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in memory.

    Args:
        x_train: training inputs, (N, *features), N >= 2; float64 and uint8 become float32.
        y_train: training targets. For classification class numbers from 0 on, (N,), at least two of them different;
            for regression numbers, (N,) or (N, outputs), which are stored as (N, outputs), shifted and scaled to mean
            0 and standard deviation 1 over the training samples.
        x_test: test inputs, (M, *features), M >= 2.
        y_test: test targets, of the same kind; scaled as the training targets are.
        name: what reports call it.
        scaling: one sentence on how the inputs were scaled, for the report.
        task: "classification" or "regression".

    Raises:
        DataError: too few samples, targets that do not suit the task or are all the same, NaN or Inf.

    Example:
        >>> import torch
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 4
        >>> Data(x[:10], y[:10], x[10:], y[10:], name="noise").outputs
        4
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    name: str = "data"
    scaling: str = AS_GIVEN
    task: str = CLASSIFICATION

    def __post_init__(self) -> None:
        task = task_named(self.task)
        for part in ("train", "test"):
            x = as_inputs(getattr(self, f"x_{part}"), f"x_{part}")
            y = task.targets(getattr(self, f"y_{part}"), f"y_{part}")
            _check_lengths(x, y, part)
            object.__setattr__(self, f"x_{part}", x)
            object.__setattr__(self, f"y_{part}", y)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise DataError(
                message(
                    "x_test",
                    got=f"samples of shape {tuple(self.x_test.shape[1:])}",
                    expected=f"the shape of the training samples, {tuple(self.x_train.shape[1:])}",
                )
            )
        for part in ("train", "test"):
            task.check(getattr(self, f"y_{part}"), f"y_{part}")
        same_outputs(self.y_train, self.y_test)
        if self.y_train.is_floating_point():
            self._scale_targets()

    def _scale_targets(self) -> None:
        std, mean = torch.std_mean(self.y_train, dim=0)
        for part in ("train", "test"):
            object.__setattr__(self, f"y_{part}", ((getattr(self, f"y_{part}") - mean) / std).float())

    @property
    def outputs(self) -> int:
        """The outputs that a network needs: the largest label plus one, or the numbers a sample."""
        return task_named(self.task).outputs((self.y_train, self.y_test))


@dataclass(frozen=True, eq=False)
class Loaders:
    """Two iterables of (inputs, targets) batches, as a `torch.utils.data.DataLoader` gives them."""

    train: Iterable[Any]
    test: Iterable[Any]
    name: str = "the given loaders"
    task: str = CLASSIFICATION


def _check_lengths(x: Tensor, y: Tensor, part: str) -> None:
    if len(x) != len(y):
        raise DataError(
            message(f"{part} data", got=f"{len(x)} inputs and {len(y)} targets", expected="as many of each")
        )
    if len(x) < 2:
        held = "no samples" if len(x) == 0 else "one sample"
        raise DataError(message(f"{part} data", got=held, expected="at least two samples"))

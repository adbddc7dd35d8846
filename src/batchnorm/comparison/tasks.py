"""What a network learns: class numbers, or numbers. The loss, the score, and what its output must look like."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm._errors import DataError, InputError, InputTypeError, message
from batchnorm.comparison.arrays import as_labels, as_values, check_classes, check_varies
from batchnorm.comparison.measures import clear_guess

__all__ = ["TASKS", "Task", "same_outputs", "task_named"]


class Task(ABC):
    """What a network learns. A score lies between 0 and 1, and a higher one is better."""

    name: ClassVar[str]
    loss_name: ClassVar[str]
    unit: ClassVar[str]  # what one output stands for

    @abstractmethod
    def targets(self, value: Any, name: str) -> Tensor:
        """What the user gave as targets, checked and in the form that `loss` takes."""

    @abstractmethod
    def check(self, y: Tensor, name: str) -> None:
        """Refuse targets in which there is nothing to learn."""

    @abstractmethod
    def outputs(self, parts: Sequence[Tensor]) -> int:
        """How many outputs a network needs for these targets."""

    @abstractmethod
    def width(self, y: Tensor) -> int:
        """The least number of outputs that the loss of these targets can be computed of."""

    @abstractmethod
    def lowest(self, parts: Sequence[Tensor]) -> int:
        """The smallest class number; 0 where there are no classes."""

    @abstractmethod
    def fit(self, output: object, x: Tensor, outputs: int) -> Tensor | None:
        """The output for `x` as (N, outputs), or None where it is something else."""

    @abstractmethod
    def expected(self, x: Tensor, outputs: int | None) -> str:
        """The form of output that `fit` takes, in words."""

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean loss that is trained on."""

    @abstractmethod
    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """The score of (output, targets) batches, 0 to 1."""

    @abstractmethod
    def guess(self, y: Tensor) -> float:
        """The score on targets `y` of the best answer that does not look at the input."""

    @abstractmethod
    def clear(self, guess: float, samples: int) -> float:
        """The score that is clearly above guessing."""


class Classification(Task):
    """Class numbers from 0 on: cross entropy, and the share of test samples that is right."""

    name = "classification"
    loss_name = "cross entropy"
    unit = "class"

    def targets(self, value: Any, name: str) -> Tensor:
        """Class numbers (N,), int64."""
        return as_labels(value, name)

    def check(self, y: Tensor, name: str) -> None:
        """Refuse one class only."""
        check_classes(y, name)

    def outputs(self, parts: Sequence[Tensor]) -> int:
        """The largest class number plus one."""
        return 1 + max(int(part.max()) for part in parts)

    def width(self, y: Tensor) -> int:
        """One: a class number beyond the scores is the loss's error, and asking for the largest would cost time."""
        return 1

    def lowest(self, parts: Sequence[Tensor]) -> int:
        """The smallest class number."""
        return min(int(part.min()) for part in parts)

    def fit(self, output: object, x: Tensor, outputs: int) -> Tensor | None:
        """Scores (N, classes), as many classes as there are or more."""
        if not isinstance(output, Tensor) or output.dim() != 2 or not output.is_floating_point():
            return None
        return output if len(output) == len(x) and output.shape[1] >= outputs else None

    def expected(self, x: Tensor, outputs: int | None) -> str:
        """Scores (N, classes)."""
        more = "" if outputs is None else f" and at least {outputs} classes"
        return f"shape ({len(x)}, classes) for {len(x)} samples{more}"

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross entropy, nats a sample."""
        return F.cross_entropy(output, y)

    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Accuracy: the share that is right; scores of NaN or Inf are wrong."""
        right, samples = 0, 0
        for output, y in batches:
            right += int(((output.argmax(1) == y) & output.isfinite().all(1)).sum())
            samples += len(y)
        return right / samples

    def guess(self, y: Tensor) -> float:
        """The share of the most frequent class."""
        return int(y.bincount().max()) / len(y)

    def clear(self, guess: float, samples: int) -> float:
        """Two standard errors above guessing."""
        return clear_guess(guess, samples)


class Regression(Task):
    """Numbers: mean squared error, and R² = 1 − Σ(ŷ − y)²/Σ(y − ȳ)² on the test samples.

    Of several outputs the plain average counts. Below 0, where a network is worse than the mean of the test targets
    as a prediction for all of them, R² counts as 0: how much worse says nothing more.
    """

    name = "regression"
    loss_name = "mean squared error"
    unit = "number to predict"

    def targets(self, value: Any, name: str) -> Tensor:
        """Numbers (N, outputs), floating point."""
        return as_values(value, name)

    def check(self, y: Tensor, name: str) -> None:
        """Refuse an output whose targets are all the same."""
        check_varies(y, name)

    def outputs(self, parts: Sequence[Tensor]) -> int:
        """The numbers a sample."""
        return parts[0].shape[1]

    def width(self, y: Tensor) -> int:
        """The numbers a sample."""
        return y.shape[1]

    def lowest(self, parts: Sequence[Tensor]) -> int:
        """No classes: 0."""
        return 0

    def fit(self, output: object, x: Tensor, outputs: int) -> Tensor | None:
        """Numbers (N, outputs); of one output also (N,)."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or len(x) == 0:
            return None
        column = output.unsqueeze(1) if output.dim() == 1 else output
        right = column.dim() == 2 and len(column) == len(x) and (outputs < 1 or column.shape[1] == outputs)
        return column if right else None

    def expected(self, x: Tensor, outputs: int | None) -> str:
        """Numbers (N, outputs)."""
        return f"shape ({len(x)}, {outputs if outputs else 'outputs'}) for {len(x)} samples"

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean of (ŷ − y)²."""
        return F.mse_loss(output, y.to(output.dtype))

    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """R², at least 0; of predictions that are NaN or Inf 0."""
        pairs = [(output.double().cpu(), y.double().cpu()) for output, y in batches]
        predicted, y = (torch.cat([pair[at] for pair in pairs]) for at in (0, 1))
        wrong = (predicted - y).square().sum(0)
        r2 = (1 - wrong / (y - y.mean(0)).square().sum(0)).mean().item()
        return max(r2, 0.0) if r2 == r2 else 0.0

    def guess(self, y: Tensor) -> float:
        """R² of the mean: 0."""
        return 0.0

    def clear(self, guess: float, samples: int) -> float:
        """4/n: the squared correlation with unrelated predictions stays below it in about 95 %."""
        return guess + 4 / samples


TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Regression())}


def task_named(name: object) -> Task:
    """A task by its name.

    Raises:
        InputError: an unknown name.
        InputTypeError: no name.

    Example:
        >>> task_named("regression").loss_name
        'mean squared error'
    """
    if not isinstance(name, str):
        raise InputTypeError(message("task", got=repr(name), expected=f"one of {', '.join(TASKS)}"))
    if name not in TASKS:
        raise InputError(message("task", got=repr(name), expected=f"one of {', '.join(TASKS)}"))
    return TASKS[name]


def same_outputs(first: Tensor, second: Tensor) -> None:
    """Refuse test targets with another number of outputs than the training targets."""
    if first.shape[1:] != second.shape[1:]:  # class numbers have none
        raise DataError(
            message(
                "y_test",
                got=f"{second.shape[1]} numbers a sample",
                expected=f"{first.shape[1]}, as the training targets have",
            )
        )

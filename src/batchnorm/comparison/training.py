"""One training, recorded."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batchnorm._errors import BatchNormError, InputError, InputTypeError, ModelError, message
from batchnorm.comparison.pairs import raised, scores
from batchnorm.comparison.progress import Progress
from batchnorm.comparison.record import Batch, Replay, seeded
from batchnorm.comparison.tasks import Task

if TYPE_CHECKING:
    from batchnorm.comparison.dynamics import Watch

__all__ = ["OPTIMIZERS", "MakeOptimizer", "Run", "optimizer_maker", "score_on", "train"]

MakeOptimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}


@dataclass(frozen=True)
class Run:
    """The record of one training.

    Args:
        normalized: with batch norm or without.
        lr: learning rate.
        seed: the seed of weights and batches.
        steps: the steps at which it was evaluated, from 0 on.
        score: test accuracy or R² at these steps, 0 to 1.
        loss: mean training loss since the evaluation before; NaN at step 0.
        diverged: the training loss became NaN or infinite; the training ended there.
        trained_steps: how many steps were made.
        seconds: time of the training steps alone, without evaluations.
    """

    normalized: bool
    lr: float
    seed: int
    steps: tuple[int, ...]
    score: tuple[float, ...]
    loss: tuple[float, ...]
    diverged: bool
    trained_steps: int
    seconds: float = field(compare=False)

    @property
    def label(self) -> str:
        """Which of the two networks this is, in words."""
        return "with batch norm" if self.normalized else "without batch norm"


def optimizer_maker(optimizer: str | MakeOptimizer) -> MakeOptimizer:
    """The function (parameters, lr) -> optimizer behind a name.

    Raises:
        InputError: an unknown name.
        InputTypeError: neither a name nor a function.
    """
    if callable(optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise InputTypeError(
            message(
                "optimizer",
                got=f"a {type(optimizer).__name__}",
                expected=f"one of {', '.join(OPTIMIZERS)}, or a function (parameters, lr) -> optimizer",
            )
        )
    if optimizer not in OPTIMIZERS:
        raise InputError(
            message(
                "optimizer",
                got=repr(optimizer),
                expected=f"one of {', '.join(OPTIMIZERS)}",
                fix="Any other is given as a function (parameters, lr) -> optimizer.",
            )
        )
    return OPTIMIZERS[optimizer]


def train(
    model: nn.Module,
    batches: Replay,
    test: Sequence[Batch],
    task: Task,
    *,
    normalized: bool,
    lr: float,
    seed: int,
    every: int,
    make_optimizer: MakeOptimizer,
    progress: Progress,
    watch: "Watch | None" = None,
) -> Run:
    """Train `model` in place on the batches, one step each, and evaluate it every `every` steps and at the end.

    `watch` may look on; what it does takes no part in the training, and its time is not counted.
    """
    device = batches.device
    with seeded(seed, device), torch.enable_grad():
        optimizer = _made(make_optimizer, [p for p in model.parameters() if p.requires_grad], lr)
        steps, scored, losses = [0], [score_on(model, test, task)], [math.nan]
        model.train()
        recent: list[float] = []
        seconds, diverged, step = 0.0, False, 0
        if watch is not None:
            watch.evaluated(0, model)
        for step, (x, y) in enumerate(batches, start=1):
            if watch is not None:
                watch.before(step, model)
            begin = time.perf_counter()
            loss = _step(model, optimizer, x, y, task)
            seconds += time.perf_counter() - begin
            if not math.isfinite(loss):
                diverged = True
                break
            if watch is not None:
                watch.after(step, model, x, y)
            recent.append(loss)
            if step % every == 0 or step == len(batches):
                steps.append(step)
                scored.append(score_on(model, test, task))
                losses.append(sum(recent) / len(recent))
                recent.clear()
                if watch is not None:
                    watch.evaluated(step, model)
                progress.step(step, len(batches), losses[-1], scored[-1])
    return Run(normalized, lr, seed, tuple(steps), tuple(scored), tuple(losses), diverged, step, seconds)


def score_on(model: nn.Module, test: Sequence[Batch], task: Task) -> float:
    """The score of the model, in eval mode, on the test samples."""
    training = model.training
    model.eval()
    with torch.no_grad():
        result = task.score((scores(model, x, y, task), y) for x, y in test)
    model.train(training)
    return result


def _made(make_optimizer: MakeOptimizer, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    try:
        optimizer: object = make_optimizer(parameters, lr)
    except BatchNormError:
        raise
    except Exception as error:
        raise InputError(
            message("optimizer", got=raised(error), expected="a function (parameters, lr) -> optimizer")
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputTypeError(
            message(
                "optimizer",
                got=f"a function that returns a {type(optimizer).__name__}",
                expected="a function (parameters, lr) -> torch.optim.Optimizer",
            )
        )
    return optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, task: Task) -> float:
    output = scores(model, x, y, task)
    try:
        loss = task.loss(output, y)
        value = float(loss.item())
        if math.isfinite(value):
            optimizer.zero_grad()
            loss.backward()
    except Exception as error:
        raise ModelError(
            message(
                "the model",
                got=f"an error in a training step ({raised(error)})",
                expected=f"an output that {task.loss_name} and its gradient can be computed of",
            )
        ) from error
    if math.isfinite(value):
        _update(optimizer)
    return value


def _update(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
        raise InputTypeError(
            message(
                "optimizer",
                got=f"{type(optimizer).__name__}, whose step() fails ({raised(error)})",
                expected="an optimizer whose step() needs no argument",
            )
        ) from error

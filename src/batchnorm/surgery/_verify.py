"""Whether a changed model still gives what the model gave, on an example."""

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import ModelError, message
from batchnorm._walk import copied
from batchnorm.surgery import _kinds as kinds

__all__ = ["Example", "differences"]


class Example:
    """The arguments of one call of a model, and what the model gave for them before it was changed.

    `example` is a tensor, a tuple of positional or a dictionary of keyword arguments. `ranks` says with how many axes
    each batch norm was called, by its name.
    """

    def __init__(self, example: object, operation: str, model: nn.Module) -> None:
        self.operation = operation
        self.positional: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}
        if isinstance(example, tuple):
            self.positional = example
        elif isinstance(example, Mapping):
            self.keywords = dict(example)
        else:
            self.positional = (example,)
        self.ranks: dict[str, set[int]] = {}
        self.outputs = self._run(model, watch=True)

    def arguments(self, model: nn.Module) -> dict[str, Any] | None:
        """The arguments by their names in the model's forward; None if it does not take them by name."""
        try:
            bound = inspect.signature(model.forward).bind(*self.positional, **self.keywords)
        except TypeError:
            return None
        return dict(bound.arguments)

    def compare(self, model: nn.Module) -> list[str]:
        """One line an output that says how far it is from what it was.

        Raises:
            ModelError: the model does not run, or gives something else.
        """
        return differences(self.outputs, self._run(model), self.operation)

    def _run(self, model: nn.Module, *, watch: bool = False) -> list[tuple[str, Tensor]]:
        """The outputs of a copy that shares the parameters: a forward may leave traces on its modules."""
        try:
            scratch = copied(model, share_parameters=True)
            if watch:
                for name, module in scratch.named_modules(remove_duplicate=False):
                    if kinds.is_batch_norm(module):
                        module.register_forward_pre_hook(self._watcher(name))
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return list(_tensors(scratch(*self.positional, **self.keywords), "output"))
        except Exception as error:  # forward is any code at all
            what = "model" if watch else "changed model"
            raise ModelError(
                message(
                    f"{self.operation}: {what} on the example",
                    got=f"{type(error).__name__}: {error}",
                    expected="a call that runs",
                    fix="Pass the arguments of forward: a tensor, a tuple of them, or a dictionary by name."
                    if watch
                    else "Nothing was changed.",
                )
            ) from error

    def _watcher(self, name: str) -> Any:
        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments:
                self.ranks.setdefault(name, set()).add(arguments[0].dim())

        return note


def _tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output, with words for where it stands."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(each, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _tensors(each, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name), f"{name}.{field.name}")


def differences(
    before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]], operation: str
) -> list[str]:
    """How far each output is from what it was, in words.

    The error is the largest one, relative to the largest value. Folding rounds each weight once, so it stays some
    roundings wide, while a wrong fold is wrong in the first digits; the bound between the two is √eps of the output's
    dtype: half of its digits. Integers (an argmax) are counted only: the smallest rounding may turn one.

    Raises:
        ModelError: an output is missing, has another shape, or is further off than that.
    """
    names = [name for name, _ in before]
    if names != [name for name, _ in after] or any(
        a.shape != b.shape or a.dtype != b.dtype for (_, a), (_, b) in zip(before, after, strict=True)
    ):
        raise _wrong(operation, "outputs of another form than before")
    lines = []
    for (name, old), (_, new) in zip(before, after, strict=True):
        if not (old.is_floating_point() or old.is_complex()):
            lines.append(f"{name}: {int((old != new).sum())} of {old.numel()} entries differ")
            continue
        bound = math.sqrt(torch.finfo(old.dtype).eps)
        absolute, largest = _error(old, new)
        relative = absolute / largest if largest else absolute
        text = f"max abs error {absolute:.2g}, relative {relative:.2g}"
        if not relative <= bound:
            raise _wrong(operation, f"{name} with {text} (bound {bound:.2g})")
        lines.append(f"{name}: {text}")
    if not lines:
        raise _wrong(operation, "a call without a tensor among its outputs")
    return lines


def _error(old: Tensor, new: Tensor) -> tuple[float, float]:
    """The largest difference and the largest value; infinitely much where a NaN or an infinity came or went."""
    wide = torch.complex128 if old.is_complex() else torch.float64
    a, b = old.detach().to("cpu", wide), new.detach().to("cpu", wide)
    finite = a.isfinite()
    same = torch.where(finite, b.isfinite(), (a == b) | (a.isnan() & b.isnan()))
    if not bool(same.all()):
        return math.inf, 1.0
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0, 0.0
    return float((a - b).abs().max()), float(a.abs().max())


def _wrong(operation: str, got: str) -> ModelError:
    return ModelError(
        message(
            f"{operation}: the example",
            got=got,
            expected="what the model gives without the change",
            fix="Nothing was changed. If the model is not the same function from call to call, leave the example out.",
        )
    )

"""How a model is called with a batch, and how many samples that batch holds."""

import inspect
from collections.abc import Callable, Container, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._errors import DataError, InputTypeError, message

__all__ = ["Forward", "call", "check_loader", "place_of", "samples_in", "taken_as_input"]

Forward = Callable[[nn.Module, Any], object]


def check_loader(loader: object, operation: str, again: bool, argument: str = "loader") -> None:
    """Refuse what no batches can be taken from; with `again`, also what gives them only once.

    `argument` is what the operation calls it.

    Raises:
        InputTypeError: no iterable of batches.
        DataError: an iterator where several passes are needed.
    """
    if isinstance(loader, Tensor | str | bytes | Mapping) or not isinstance(loader, Iterable):
        raise InputTypeError(
            message(
                f"{operation}: {argument}",
                got=f"a {type(loader).__name__}",
                expected="something that gives batches, as a DataLoader or a list of tensors does",
                fix=_instead(loader, argument),
            )
        )
    if again and iter(loader) is loader:
        raise DataError(
            message(
                f"{operation}: {argument}",
                got=f"a {type(loader).__name__}, which gives its batches only once",
                expected="something that can be gone through several times",
                fix="Give the DataLoader itself, a list, or mode='joint', which needs one pass.",
            )
        )


def _instead(loader: object, argument: str) -> str:
    if isinstance(loader, Tensor | Mapping):
        return "Put the one batch into a list: [batch]."
    return f"Give what it returns: {argument}={loader.__name__}()." if inspect.isfunction(loader) else ""


def taken_as_input(batch: Any) -> str:
    """Which part of a tuple or list `call` gives the model, in a sentence; "" of other batches."""
    if not isinstance(batch, tuple | list) or not batch:
        return ""
    first = batch[0]
    what = f"a {type(first).__name__}"
    if isinstance(first, Tensor):
        what = f"{str(first.dtype).removeprefix('torch.')} of shape {tuple(first.shape)}"
    return f"The first of {len(batch)} elements was taken as the input: {what}. "


def place_of(model: nn.Module) -> torch.device | None:
    """Where the model's first parameter or buffer lives."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def call(model: nn.Module, batch: Any, forward: Forward | None, device: torch.device | None) -> None:
    """Run the model: `forward(model, batch)`, or by the kind of the batch. Of a dict it gets what its forward names.

    Raises:
        DataError: a batch that no rule is for.
    """
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        known, needed = _arguments(model)
        wanted = {str(key): value for key, value in batch.items() if known is None or str(key) in known}
        missing = [name for name in needed if name not in wanted]
        if missing:
            raise DataError(_unnamed(batch, missing))
        model(**{key: _moved(value, device) for key, value in wanted.items()})
    elif isinstance(batch, tuple | list) and batch:
        model(_moved(batch[0], device))
    elif isinstance(batch, Tensor):
        model(_moved(batch, device))
    else:
        how = "Make it a tensor: torch.as_tensor(batch)." if hasattr(batch, "__array__") else ""
        raise DataError(
            message(
                "batch",
                got=f"{'an empty' if isinstance(batch, tuple | list) else 'a'} {type(batch).__name__}",
                expected="a tensor, a tuple or list whose first element is the input, or a dict of keyword arguments",
                fix=how or "Say how the model is called: forward=lambda model, batch: model(...).",
            )
        )


def _arguments(model: nn.Module) -> tuple[Container[str] | None, list[str]]:
    """What the forward can be given by name (None: anything), and what it must. A batch may hold more: labels."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [each.name for each in parameters if each.kind in named and each.default is each.empty]
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return None, needed
    return {each.name for each in parameters}, needed


def _unnamed(batch: Mapping[Any, Any], missing: list[str]) -> str:
    keys = [str(key) for key in batch]
    return message(
        "batch",
        got=f"a {type(batch).__name__} of {', '.join(keys) or 'nothing'}",
        expected=f"the arguments of the model's forward by name, {', '.join(missing)} among them",
        fix=f"Name them so, or give forward=lambda model, batch: model(batch[{(keys or missing)[0]!r}]).",
    )


def samples_in(batch: Any) -> int | None:
    """The length of the first axis of the first tensor found in the batch."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping | tuple | list):
        return None
    return next((size for part in parts if (size := samples_in(part)) is not None), None)


def _moved(value: Any, device: torch.device | None) -> Any:
    """The value with every tensor in it on the model's device."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value

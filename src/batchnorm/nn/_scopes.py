"""What layers are told by the `with` blocks around their call, where an argument of the call cannot reach them."""

import threading
from typing import Any

from torch.nn import Module

from batchnorm._errors import InputError, InputTypeError, message

__all__ = ["Scope", "Told"]

Entry = tuple[Any, tuple[Module, ...] | None]


class _Open(threading.local):
    """The blocks that are open in this thread, the innermost last. torch.compile cannot read a ContextVar."""

    entries: tuple[Entry, ...] = ()


class Told:
    """One kind of thing that layers of a class can be told.

    torch.compile follows both the blocks and `by`, and compiles anew for another value: entries are plain tuples, and
    layers are compared by identity.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._open = _Open()

    def by(self, layer: Module) -> Any:
        """What the innermost block that reaches this layer says; None without one."""
        for value, reached in reversed(self._open.entries):
            if reached is None or any(layer is each for each in reached):
                return value
        return None

    def within(self, value: Any, model: Module | None, kind: type[Module]) -> "Scope":
        """The block that tells it to the layers of this kind, in the whole thread or in `model` alone."""
        if model is not None and not isinstance(model, Module):
            raise InputTypeError(
                message(
                    f"{self._name}: model",
                    got=type(model).__name__,
                    expected="a torch.nn.Module, or None for all",
                )
            )
        reached = None if model is None else tuple(each for each in model.modules() if isinstance(each, kind))
        if reached == ():
            raise InputError(
                message(
                    f"{self._name}: model",
                    got=f"a {type(model).__name__} without a {kind.__name__}",
                    expected="a model with such layers, or None for all",
                )
            )
        return Scope(self._open, value, reached)


class Scope:
    """A `with` block. It may be entered again, also inside itself."""

    def __init__(self, opened: _Open, value: Any, reached: tuple[Module, ...] | None) -> None:
        self._open = opened
        self._entry = (value, reached)

    def __enter__(self) -> None:
        self._open.entries = (*self._open.entries, self._entry)

    def __exit__(self, *error: object) -> None:
        self._open.entries = self._open.entries[:-1]

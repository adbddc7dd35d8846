"""A hook that stays with the module it was made for."""

from collections.abc import Callable
from typing import Any

__all__ = ["Ear", "deaf"]


class Ear:
    """A hook. In a copy of the model, or a pickle of it, stands one that hears nothing."""

    def __init__(self, heard: Callable[..., None]) -> None:
        self._heard = heard

    def __call__(self, *args: Any) -> None:
        self._heard(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_deaf, ())


def _deaf() -> Callable[..., None]:
    return deaf


def deaf(*args: Any) -> None:
    """The hook of a copy."""

"""A module in a few words, for reports."""

import inspect
from typing import Any

import torch
from torch import nn

from batchnorm import nn as ours

__all__ = ["short"]

_LONG = 80
_FEW = 3
_PLAIN = (bool, int, float, str, tuple, list, type(None))


def short(module: nn.Module) -> str:
    """The module as one would make it: its class and what is not at its default.

    A class that PyTorch and this package both have is named with its package. Of a module that holds others only
    the class is told, and of a short nn.Sequential what stands in it.

    Example:
        >>> short(nn.Conv2d(3, 8, kernel_size=(5, 5), bias=False))
        'Conv2d(3, 8, 5, bias=False)'
        >>> short(nn.BatchNorm2d(8)), short(ours.BatchNorm2d(8, activation="relu"))
        ('torch.nn.BatchNorm2d(8)', "batchnorm.BatchNorm2d(8, activation='relu')")
    """
    name = _name(type(module))
    children = [child for child in module._modules.values() if child is not None]
    if type(module) is nn.Sequential and len(children) <= _FEW:
        return f"{name}({', '.join(short(child) for child in children)})"
    if children:
        return f"{name}({_modules(len(children))})" if isinstance(module, nn.Sequential) else name
    return f"{name}({_arguments(module)})"


def _name(cls: type[nn.Module]) -> str:
    name = cls.__name__
    for package, space in (("batchnorm", ours), ("torch.nn", nn)):
        if getattr(space, name, None) is cls and hasattr(ours, name):
            return f"{package}.{name}"
    return name


def _modules(count: int) -> str:
    return f"{count} modules"


def _arguments(module: nn.Module) -> str:
    make = type(module).__init__
    known = ("torch.nn.", "batchnorm.")
    if not (make.__module__.startswith(known) and type(module).extra_repr.__module__.startswith(known)):
        return _clipped(" ".join(module.extra_repr().split()))
    parts = []
    for name, parameter in list(inspect.signature(make).parameters.items())[1:]:
        value = _value(module, name)
        if not isinstance(value, _PLAIN) or name in ("device", "dtype"):
            continue
        if parameter.default is parameter.empty:
            parts.append(str(value))
        elif value != _single(parameter.default):
            parts.append(f"{name}={value!r}")
    return _clipped(", ".join(parts))


def _value(module: nn.Module, name: str) -> Any:
    """The argument that a module was made with, as far as its attributes tell."""
    missing = inspect.Parameter.empty
    value = getattr(module, name, missing)
    if name == "bias" and name in module._parameters:
        # A batch norm without γ has no β either, which `affine` says.
        return value is not None or getattr(module, "affine", True) is False
    return missing if isinstance(value, torch.Tensor) else _single(value)


def _single(value: Any) -> Any:
    """3 for (3, 3), which is what one writes."""
    same = isinstance(value, tuple) and len(set(map(repr, value))) == 1
    return value[0] if same else value


def _clipped(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"

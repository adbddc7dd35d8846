"""Conversions that put a new module in a layer's place: to members that hold other parameters, and from them."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from batchnorm._walk import copied, hooks_of
from batchnorm.nn.batch_norm import Extras
from batchnorm.nn.families import FAMILIES, Family, family_of
from batchnorm.nn.frozen import Frozen
from batchnorm.surgery._fitness import has_more, unconvertible
from batchnorm.surgery._trace import Traced

__all__ = ["KEPT", "make", "part_of", "ready_copy", "rebuilt_of", "takes_elsewhere"]

# The options of `convert` that say whose numbers stay.
KEPT = frozenset(family.rebuilt.kept for family in FAMILIES.values() if family.rebuilt is not None)


def rebuilt_of(module: nn.Module) -> Family | None:
    """The member that a module belongs to, if its layers are made anew."""
    found = family_of(getattr(type(module), "_base", type(module)))  # frozen: what it was
    return found[0] if found is not None and found[0].rebuilt is not None else None


def takes_elsewhere(family: Family) -> bool:
    """Whether its layers take residual and mask at other places than a plain batch norm."""
    places = {getattr(cls, "_mask_place", Extras._mask_place) for cls in family.classes.values()}
    return places != {Extras._mask_place}


def _unfit(module: nn.Module) -> str:
    """Why no other module can stand in this one's place."""
    if any(isinstance(each, Frozen) for each in module.modules()):
        return "it is frozen: unfreeze it first"
    hooks = [hook for each in module.modules() for hook in hooks_of(each)]
    return f"it carries a {hooks[0]}, which would be lost" if hooks else ""


def part_of(
    module: nn.Module, kept: Mapping[str, object], parts: tuple[Traced, ...]
) -> tuple[nn.Module | None, str]:
    """A batch norm with the numbers of that part of a rebuilt layer which `kept` names, or why there is none."""
    family = rebuilt_of(module)
    assert family is not None
    assert family.rebuilt is not None
    option, several = family.rebuilt.kept, family.rebuilt.parts
    if option not in kept:
        return None, f"it has {several}: say whose to keep with {option}="
    reason = _unfit(module)
    if any(value is not None for part in parts for value in _given(module, option, part)):
        reason = reason or f"the model calls it with a {option}, which no other batch norm takes"
    if reason:
        return None, reason
    found = family.rebuilt.back(module, kept[option])
    return (None, found) if isinstance(found, str) else (found, f"the numbers of {option}={kept[option]!r}")


def _given(module: nn.Module, argument: str, part: Traced) -> Iterator[object]:
    """What a graph gives a layer for an argument, in each call."""
    names = list(inspect.signature(module.forward).parameters)
    for node in part.calls(module):
        yield {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get(argument)


def make(
    module: nn.Module, ready: nn.Module, family: Family, options: Mapping[str, Any], parts: tuple[Traced, ...]
) -> tuple[nn.Module | None, str]:
    """A layer of a rebuilt member, made of `ready`, which stands for `module`; or why there is none."""
    assert family.rebuilt is not None
    if takes_elsewhere(family) and any(has_more(module, part) for part in parts):
        return None, "it is called with a residual or a mask by position, where the condition would stand"
    own = {name: value for name, value in options.items() if name in family.rebuilt.options}
    found = family.rebuilt.make(ready, own)
    return (None, found) if isinstance(found, str) else (found, "")


def ready_copy(module: nn.Module) -> tuple[nn.Module | None, str]:
    """A copy of a plain layer with its very parameters, to make another of; or why there is none."""
    known = family_of(type(module))
    classes = () if known is None or known[2] else (type(module),)
    reason = "" if isinstance(module, Frozen) else unconvertible(module, classes)
    reason = reason or _unfit(module)
    return (None, reason) if reason else (copied(module, share_parameters=True), "")

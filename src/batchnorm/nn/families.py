"""The members of the batch-norm family by name: each says here which classes it has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from batchnorm._errors import InputError, message
from batchnorm.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d

__all__ = ["FAMILIES", "Family", "Rebuilt", "family_of", "register"]


@dataclass(frozen=True)
class Family:
    """One member: its layers for 1, 2 and 3 axes behind the channels, and its lazy ones if it has some.

    A member whose layers hold other parameters than a batch norm's is `rebuilt`: `convert` puts a new module in a
    layer's place instead of giving the layer another class.
    """

    name: str
    classes: Mapping[int, type[torch.nn.Module]]
    lazy: Mapping[int, type[torch.nn.Module]] = field(default_factory=dict)
    rebuilt: "Rebuilt | None" = None


@dataclass(frozen=True)
class Rebuilt:
    """How `convert` comes to a member whose layers are new modules, and from it.

    `make(layer, options)` is given a layer of another class, which it may take apart, and those of the options that
    `options` names. `back(layer, kept)` gives a layer of its own with the numbers of a part, which the user names by
    the option `kept`. Either returns the reason where it cannot.
    """

    make: Callable[[torch.nn.Module, Mapping[str, Any]], torch.nn.Module | str]
    back: Callable[[torch.nn.Module, object], torch.nn.Module | str]
    options: tuple[str, ...]
    kept: str
    parts: str  # of what it has several, in the words of a message


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a member known by its name.

    Raises:
        InputError: the name is taken.
    """
    if family.name in FAMILIES:
        raise InputError(message("family", got=f"{family.name!r} twice", expected="a name of its own"))
    FAMILIES[family.name] = family
    return family


def family_of(cls: type[torch.nn.Module]) -> tuple[Family, int, bool] | None:
    """The family of a class, its number of axes (0 for one class that serves all) and whether it is a lazy one."""
    for family in FAMILIES.values():
        for lazy, classes in ((False, family.classes), (True, family.lazy)):
            axes = [rank for rank, each in classes.items() if each is cls]
            if axes:
                return family, axes[0] if len(axes) == 1 else 0, lazy
    return None


register(
    Family(
        "batchnorm",
        {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d},
        {1: LazyBatchNorm1d, 2: LazyBatchNorm2d, 3: LazyBatchNorm3d},
    )
)
register(
    Family(
        "torch",
        {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d},
        {1: torch.nn.LazyBatchNorm1d, 2: torch.nn.LazyBatchNorm2d, 3: torch.nn.LazyBatchNorm3d},
    )
)
register(Family("torch-sync", dict.fromkeys((1, 2, 3), torch.nn.SyncBatchNorm)))

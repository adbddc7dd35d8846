"""The numbers of a running average in another framework: its momentum, its variance, its correction for the start."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.stats._conventions import Convention
from batchnorm.stats._variables import Layer, times

__all__ = ["Count", "corrected", "next_weight", "number", "other", "plain", "scaled", "share_of", "whole"]

Count = float | Mapping[str, float]


def other(momentum: float) -> float:
    """1 − momentum as people write it: 0.1 of 0.9, where floating point has 0.09999999999999998."""
    return float(1 - Decimal(repr(momentum)))


def number(name: str, value: Any, low: float, high: float) -> float:
    if value is None and name == "momentum":
        raise InputError(
            message(
                "momentum",
                got="None, the plain average over all batches",
                expected="a number: no other framework has it",
                fix="Give the momentum to go on with, momentum=0.1 say.",
            )
        )
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputTypeError(message(name, got=f"a {type(value).__name__}", expected="a number"))
    if not low <= value <= high:
        raise InputError(message(name, got=value, expected=f"a number from {low} to {high}"))
    return float(value)


def whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputTypeError(message(name, got=f"a {type(value).__name__}", expected="a whole number"))
    if value < 0:
        raise InputError(message(name, got=value, expected="a whole number ≥ 0"))
    return int(value)


def scaled(layer: Layer, count: Count | None, factor: Callable[[float], float]) -> Layer:
    """The variance times a factor of n."""
    if isinstance(count, Mapping) and layer.name not in count:
        raise InputError(message("count", got=f"none for {layer.name}", expected="one for every layer"))
    n = count[layer.name] if isinstance(count, Mapping) else count
    if n is None:
        return layer
    n = number("count", n, 0, math.inf)
    if not 1 < n < math.inf:
        raise InputError(
            message(
                "count",
                got=n,
                expected="more than 1: the values that a channel had in a training batch, samples times positions",
            )
        )
    return replace(layer, var=times(layer.var, factor(n)))


def next_weight(momentum: float, batches: int | None) -> float | None:
    """The weight of batch t + 1 in an average that is corrected by 1 − mᵗ, where that still matters in float32."""
    if batches is None or momentum ** (batches + 1) < 2**-24 or momentum == 1:
        return None
    return (1 - momentum) / (1 - momentum ** (batches + 1))


def corrected(convention: Convention, layer: Layer, momentum: float) -> Layer:
    """With the averages that are used: Equinox keeps those before the correction."""
    share = share_of(convention, layer.batches, momentum)
    if not convention.hidden or share == 1:
        return layer
    if share == 0:
        raise InputError(
            message(
                convention.momentum,
                got=f"1, by which {convention.name} divides its averages by 0",
                expected="less than 1",
            )
        )
    return replace(layer, mean=times(layer.mean, 1 / share), var=times(layer.var, 1 / share))


def share_of(convention: Convention, batches: int | None, momentum: float) -> float:
    """1 − mᵗ, what an average that began with 0 holds after t batches; Equinox uses 1 at t = 0."""
    if batches is None or (convention.hidden and batches == 0):
        return 1.0
    return 1 - momentum**batches


def plain(momentum: float, framework: str) -> int:
    """A number of batches t with mᵗ < 2⁻²⁶: in float32, 1 − mᵗ is then 1."""
    batches = math.ceil(26 * math.log(2) / -math.log(momentum)) if 0 < momentum < 1 else 1
    if momentum == 1 or batches > 2**31 - 1:
        raise InputError(
            message(
                "momentum",
                got=f"{other(momentum):g}",
                expected=f"more than 1e-8 for {framework}, whose averages are corrected by 1 − (1 − momentum)ᵗ",
                fix="Give the momentum to go on with.",
            )
        )
    return batches

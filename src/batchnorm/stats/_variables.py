"""A framework's tree of arrays as batch norm layers, and the reverse: names and shapes, no arithmetic."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.stats._conventions import Convention, Path

__all__ = ["Layer", "Numbers", "as_vector", "check", "fill", "read", "times", "where", "write"]

# What TensorFlow appends to the name of a variable, and to that in a checkpoint.
_SUFFIXES = (":0", "/.ATTRIBUTES/VARIABLE_VALUE")
Numbers = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Layer:
    """What a layer holds, each (C,): float64 where it was float64, float32 otherwise."""

    name: str
    mean: Numbers
    var: Numbers
    weight: Numbers | None = None
    bias: Numbers | None = None
    batches: int | None = None
    # Of the averages, what is left before they are corrected for their start.
    share: float = 1.0
    dropped: tuple[str, ...] = ()


def as_vector(name: str, value: Any) -> Numbers:
    """A copy of any array with one axis of channels and others of size 1, as (C,).

    Raises:
        InputTypeError: no array of numbers.
        InputError: an array with several axes.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.dtype == torch.float64 else value.float()
    try:
        array = np.asarray(value)
        array = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    except (TypeError, ValueError) as error:
        raise InputTypeError(
            message(name, got=f"a {type(value).__name__}", expected="an array of numbers")
        ) from error
    if array.size != max(array.shape, default=0):
        raise InputError(
            message(
                name,
                got=f"shape {array.shape}",
                expected="one axis of channels, all others of size 1",
                fix="Batch norm over several axes has no counterpart in PyTorch.",
            )
        )
    return array.reshape(-1)


def times(value: Numbers, factor: float) -> Numbers:
    """The product, rounded once."""
    return (value.astype(np.float64) * factor).astype(value.dtype)


def _leaves(tree: Any, path: Path = ()) -> Iterable[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple) and not all(isinstance(value, int | float) for value in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    elif tree is not None:
        yield path, tree
        return
    else:
        return
    for key, value in items:
        for suffix in _SUFFIXES:
            key = key.removesuffix(suffix)
        yield from _leaves(value, (*path, *key.split("/")))


def _leaves_of(convention: Convention, variables: Mapping[Any, Any]) -> dict[Path, Any]:
    """Every array by its path: without the collection it is in, and without Haiku's mark of a method, "~", inside a
    layer.
    """
    collections, heads = convention.collections, {part[0] for part in _parts(convention) if len(part) > 1}
    leaves: dict[Path, Any] = {}
    for path, value in _leaves(variables):
        if collections is not None and collections[1] in variables:
            if path[0] not in collections:
                continue
            path = path[1:]
        marks = {i for i, head in enumerate(path[1:]) if head in heads and path[i] == "~"}
        leaves[tuple(part for i, part in enumerate(path) if i not in marks)] = value
    return leaves


def read(convention: Convention, variables: Any) -> tuple[list[Layer], int]:
    """The batch norm layers in a tree in its order, and how many other arrays there are.

    Raises:
        InputTypeError: no mapping, or something in it that is no array.
        InputError: no batch norm, or one with parts missing, unknown or of different sizes.
    """
    if not isinstance(variables, Mapping):
        raise InputTypeError(
            message(
                "variables",
                got=f"a {type(variables).__name__}",
                expected="a dictionary from names to arrays, nested or not",
                fix="For example {variable.name: variable for variable in layer.variables}."
                if convention.layout == "flat"
                else "",
            )
        )
    leaves, statistics = _leaves_of(convention, variables), (convention.mean, convention.var)
    paths = [path[: -len(part)] for path in leaves for part in statistics if path[-len(part) :] == part]
    if not paths:
        raise InputError(_nothing(convention, leaves))
    layers, others = [], len(leaves)
    for path in dict.fromkeys(paths):
        own = {key[len(path) :]: value for key, value in leaves.items() if key[: len(path)] == path}
        layers.append(_layer(convention, "/".join(path), own))
        others -= sum(below in _parts(convention) for below in own)
    return layers, others


def _parts(convention: Convention) -> list[Path]:
    of_some = [convention.counter, convention.empty]
    named = [convention.weight, convention.bias, convention.mean, convention.var, *convention.dropped]
    return [*named, *(part for part in of_some if part is not None)]


def _nothing(convention: Convention, leaves: Mapping[Path, Any]) -> str:
    names = sorted({path[-1] for path in leaves})
    fix = ""
    if convention.collections is not None:
        parameters, statistics = convention.collections
        fix = f'Give both of its trees: {{"{parameters}": ..., "{statistics}": ...}}.'
    elif convention.layout == "flat":
        fix = (
            "Give {variable.path: variable for variable in model.variables}, or a layer's with variable.name."
        )
    elif convention.layout == "equinox":
        fix = f'Give {{"{convention.mean[0]}": state.get(layer.{convention.mean[0]}), ...}}.'
    return message(
        f"{convention.name} variables",
        got="no batch norm among " + (", ".join(names[:8]) if names else "nothing"),
        expected=f"{_spell(convention.mean)} and {_spell(convention.var)}",
        fix=fix,
    )


def _spell(part: Path) -> str:
    return "/".join(part)


def _layer(convention: Convention, name: str, values: Mapping[Path, Any]) -> Layer:
    where, known = name or "the layer", _parts(convention)
    strange = [below for below in values if len(below) == 1 and below not in known]
    if strange:
        raise InputError(
            message(
                f"{convention.name} variables of {where}",
                got=", ".join(map(_spell, strange)),
                expected="no more than " + ", ".join(map(_spell, known)),
                fix="Spell it so, or take it out.",
            )
        )
    for part in (convention.mean, convention.var):
        if part not in values:
            raise InputError(
                message(
                    f"{convention.name} variables of {where}",
                    got=f"no {_spell(part)}",
                    expected=f"{_spell(convention.mean)} and {_spell(convention.var)}",
                )
            )
    arrays = {
        part: as_vector(f"{_spell(part)} of {where}", values[part])
        for part in (convention.mean, convention.var, convention.weight, convention.bias)
        if part in values
    }
    layer = Layer(
        name,
        arrays[convention.mean],
        arrays[convention.var],
        arrays.get(convention.weight),
        arrays.get(convention.bias),
        _batches(convention, values, where),
        dropped=tuple(_spell(part) for part in convention.dropped if part in values),
    )
    check(
        layer,
        {
            "mean": convention.mean,
            "var": convention.var,
            "weight": convention.weight,
            "bias": convention.bias,
        },
    )
    return layer


def _batches(convention: Convention, values: Mapping[Path, Any], where: str) -> int | None:
    if convention.empty is not None and bool(values.get(convention.empty, False)):
        raise InputError(
            message(
                f"{convention.name} variables of {where}",
                got=f"{_spell(convention.empty)}=True",
                expected="statistics of at least one batch",
                fix="Train a step first.",
            )
        )
    if convention.counter is None or convention.counter not in values:
        if convention.hidden and convention.counter is not None:
            raise InputError(
                message(
                    f"{convention.name} variables of {where}",
                    got=f"no {_spell(convention.counter)}",
                    expected="the number of batches, by which the averages are corrected",
                )
            )
        return None
    return int(values[convention.counter])


def check(layer: Layer, spelled: Mapping[str, Path]) -> None:
    """As many channels everywhere, and no negative variance."""
    where = layer.name or "the layer"
    for kind in ("var", "weight", "bias"):
        value = getattr(layer, kind)
        if value is not None and value.size != layer.mean.size:
            raise InputError(
                message(
                    f"{_spell(spelled[kind])} of {where}",
                    got=f"{value.size} channels",
                    expected=f"{layer.mean.size}, as in {_spell(spelled['mean'])}",
                )
            )
    if (layer.var < 0).any():
        channel = int(np.argmax(layer.var < 0))
        raise InputError(
            message(
                f"{_spell(spelled['var'])} of {where}",
                got=f"{layer.var[channel]:g} in channel {channel}",
                expected="variances ≥ 0",
            )
        )


def fill(layers: Sequence[Layer], weight: bool, bias: bool) -> tuple[list[Layer], list[str]]:
    """The same layers, all of them with γ or none, and with β or none: what is missing is 1 or 0, and a note says so.

    Raises:
        InputError: a γ or β that is to be left out and is not 1 or 0 everywhere.
    """
    kinds = (("weight", "γ", 1.0, weight), ("bias", "β", 0.0, bias))
    changed: dict[str, Any]
    filled, without = list(layers), {"γ": list[str](), "β": list[str]()}
    for kind, letter, neutral, wanted in kinds:
        for place, layer in enumerate(filled):
            value = getattr(layer, kind)
            if wanted and value is None:
                without[letter].append(layer.name)
                changed = {kind: np.full_like(layer.mean, neutral)}
                filled[place] = replace(layer, **changed)
            elif not wanted and value is not None:
                if (value != neutral).any():
                    got = f"a {letter} that is not {neutral:g}{where([layer.name])}"
                    raise InputError(message("options", got=got, expected="options that keep it"))
                changed = {kind: None}
                filled[place] = replace(layer, **changed)
    notes = [
        f"no {letter}{where(names)}: {neutral:g} in its place, which trains unless it is frozen"
        for _, letter, neutral, _ in kinds
        if (names := without[letter])
    ]
    return filled, notes


def where(names: Sequence[str]) -> str:
    """Which layers, for a sentence."""
    named = [name for name in names if name]
    if not named:
        return ""
    return " in " + ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def write(convention: Convention, layers: Sequence[Layer], shape: Sequence[int] | None) -> dict[str, Any]:
    """The tree of a framework: its names, its nesting, numpy arrays in their shape."""
    if convention.layout == "haiku" and shape is None:
        raise InputError(
            message(
                "shape",
                got="None",
                expected="the shape of Haiku's parameters, with -1 for the channels",
                fix="It has the rank of the layer's input: shape=(1, 1, 1, -1) for images, channels last.",
            )
        )
    tree: dict[str, Any] = {}
    for layer in layers:
        parts = {
            part: value.reshape(tuple(shape) if shape is not None else (-1,))
            for part, value in (
                (convention.weight, layer.weight),
                (convention.bias, layer.bias),
                (convention.mean, layer.mean),
                (convention.var, layer.var),
            )
            if value is not None
        }
        _WRITERS[convention.layout](convention, tree, layer, parts)
    return tree


def _flat(convention: Convention, tree: dict[str, Any], layer: Layer, parts: Mapping[Path, Numbers]) -> None:
    for part, value in parts.items():
        tree["/".join([*([layer.name] if layer.name else []), *part])] = value


def _nested(
    convention: Convention, tree: dict[str, Any], layer: Layer, parts: Mapping[Path, Numbers]
) -> None:
    for part, value in parts.items():
        place = tree
        if convention.collections is not None:
            place = place.setdefault(convention.collections[part in (convention.mean, convention.var)], {})
        for name in layer.name.split("/") if layer.name else []:
            place = place.setdefault(name, {})
        place[part[0]] = value


def _haiku(convention: Convention, tree: dict[str, Any], layer: Layer, parts: Mapping[Path, Numbers]) -> None:
    if not layer.name:
        raise InputError(
            message(
                "layer", got="no name", expected="a module's", fix='Give it one: names={"": "batch_norm"}.'
            )
        )
    params, state = tree.setdefault("params", {}), tree.setdefault("state", {})
    batches = np.int32(layer.batches or 0)
    for part, value in parts.items():
        if len(part) == 1:
            params.setdefault(layer.name, {})[part[0]] = value
        else:
            state[f"{layer.name}/~/{part[0]}"] = {
                "counter": batches,
                "hidden": times(value, layer.share),
                "average": value,
            }


def _equinox(
    convention: Convention, tree: dict[str, Any], layer: Layer, parts: Mapping[Path, Numbers]
) -> None:
    own: dict[str, Any] = tree.setdefault(layer.name, {}) if layer.name else tree
    own.update({part[0]: value for part, value in parts.items() if len(part) == 1})
    mean, var = parts[convention.mean], parts[convention.var]
    own[convention.mean[0]] = (times(mean, layer.share), times(var, layer.share))
    # Python's numbers become the weakly typed arrays that Equinox compares with.
    if convention.counter is not None:
        own[convention.counter[0]] = layer.batches or 0
    if convention.empty is not None:
        own[convention.empty[0]] = False


_WRITERS: dict[str, Callable[[Convention, dict[str, Any], Layer, Mapping[Path, Numbers]], None]] = {
    "flat": _flat,
    "nested": _nested,
    "haiku": _haiku,
    "equinox": _equinox,
}

"""`from_framework` and `to_framework`: batch norm layers of Keras, TensorFlow and JAX as PyTorch's, and the reverse."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.stats._averages import (
    Count,
    corrected,
    next_weight,
    number,
    other,
    plain,
    scaled,
    share_of,
    whole,
)
from batchnorm.stats._conventions import Convention, convention_of
from batchnorm.stats._variables import Layer, as_vector, check, fill, read, where, write

__all__ = ["Translation", "from_framework", "to_framework"]

_PARTS = {"weight": ("weight",), "bias": ("bias",), "mean": ("running_mean",), "var": ("running_var",)}
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, repr=False)
class Translation:
    """Batch norm layers in the names and the conventions of another framework: what `from_framework` and
    `to_framework` return.

    Attributes:
        values: the arrays: a dictionary for `load_state_dict`, or the other framework's tree.
        options: what its layers are to be built with, by the names of their constructor's arguments.
        layers: the names of the layers in the tree that was read, in its order; "" for a layer by itself.
        notes: what could not be carried over, or only under a condition.

    Example:
        >>> import numpy as np, batchnorm
        >>> batchnorm.from_framework("flax", {"mean": np.zeros(3), "var": np.ones(3)}, momentum=0.9)
        1 layer, options momentum=0.1, eps=1e-05, affine=False
          the variance is as it was, so that evaluation gives the same: flax keeps the biased one, PyTorch's layers the
          unbiased one, n/(n - 1) times as large; give count=n to have it converted
    """

    values: dict[str, Any]
    options: dict[str, Any]
    layers: tuple[str, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        """The options and the notes; the values would fill the screen."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        head = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}, options {options}"
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


def from_framework(
    framework: str,
    variables: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    count: Count | None = None,
    **options: Any,
) -> Translation:
    r"""Batch norm layers of Keras, TensorFlow, Flax, Haiku or Equinox as a state dict and options for ours.

    | framework | variables | options and their defaults |
    |---|---|---|
    | `"keras"` (3) | gamma, beta, moving_mean, moving_variance | momentum=0.99, epsilon=1e-3, scale, center |
    | `"tensorflow"` (Keras 2, tf.layers) | the same | the same, fused=True |
    | `"tf-slim"` | the same | decay=0.999, epsilon=1e-3, scale, center, fused=True |
    | `"flax"` (linen), `"nnx"` | scale, bias, mean, var | momentum=0.99, epsilon=1e-5, use_scale, use_bias |
    | `"haiku"` | scale, offset, mean_ema, var_ema | decay_rate (no default), eps=1e-5, create_scale, create_offset |
    | `"equinox"` | see `variables` | momentum=0.99, eps=1e-5, channelwise_affine, mode="batch" |

    The momentum of all of them is the weight of the old average, ours that of the new batch: 1 − theirs.

    The variance stays as it is, so that evaluation gives the same output as there. But most of them average the biased
    variance, PyTorch's layers the unbiased one, n/(n − 1) times as large, with n values of a channel in a batch. In
    further training ours would move there; `count` has the variance converted at once, as if PyTorch had averaged it.

    Haiku and Equinox (mode="batch") divide their averages by 1 − mᵗ after t batches. What comes out is their quotient;
    t becomes num_batches_tracked. While mᵗ matters, they give the next batch the weight (1 − m)/(1 − mᵗ⁺¹); a note says
    which.

    Args:
        framework: a name from the table.
        variables: arrays by their names there, anything that numpy can read: of one layer or of a whole model, nested
            or with "/" in the names. What belongs to no batch norm is left out. Flax: both collections, `{"params":
            ..., "batch_stats": ...}`. nnx: `nnx.state(model)`. Haiku: `{"params": params, "state": state}`. Keras:
            `{variable.path: variable for variable in model.variables}`. Equinox, whose layers have no names: the
            attributes of a layer, `{"weight": layer.weight, "bias": layer.bias, "batch_state_index":
            state.get(layer.batch_state_index), "batch_counter": state.get(layer.batch_counter)}`, or such dictionaries
            by names of your own.
        names: from the layers' names there to those of the modules here; "" for a layer by itself. Layers without an
            entry are left out. None keeps the names, "/" replaced by ".".
        count: n, the values that a channel had in a training batch (samples times positions), or a dictionary from the
            layers' names there to such numbers.
        options: those of the table that the layers were built with, by the names of that framework.

    Returns:
        A `Translation`. `values` are new tensors, float64 where the arrays were and float32 otherwise; the options are
        those of this package's layers, and of PyTorch's (but for bias=False before 2.13).

    Raises:
        InputError: an unknown framework, option or name; no batch norm in the variables, or one with parts missing,
            misspelled, of different sizes, or negative variances.
        InputTypeError: something that is no array, no mapping or no number.

    Source:
        docs/frameworks.md, with the place in each framework's source.

    Example:
        >>> import numpy as np, batchnorm
        >>> theirs = {"gamma": np.ones(4), "beta": np.zeros(4)}
        >>> theirs |= {"moving_mean": np.ones(4), "moving_variance": np.ones(4)}
        >>> found = batchnorm.from_framework("keras", theirs, momentum=0.9, count=11)
        >>> layer = batchnorm.BatchNorm2d(4, **found.options)
        >>> layer.load_state_dict(found.values)
        <All keys matched successfully>
        >>> layer.eps, layer.momentum, layer.running_var[0].item()
        (0.001, 0.1, 1.100000023841858)
    """
    convention = convention_of(framework, options)
    momentum, eps = _moved_by(convention, options)
    layers, others = read(convention, variables)
    _check_has(convention, options, layers)
    notes = [f"left alone: {others} other array{'s' * (others > 1)}"] if others else []
    _check_count(count, layers)
    layers = _chosen(layers, names)
    notes += _about_training(convention, layers, momentum, count)
    ready = [corrected(convention, layer, momentum) for layer in layers]
    if not convention.unbiased:
        ready = [scaled(layer, count, lambda n: n / (n - 1)) for layer in ready]
    # No layer of PyTorch's has β without γ.
    bias = any(layer.bias is not None for layer in ready)
    filled, missing = fill(ready, bias or any(layer.weight is not None for layer in ready), bias)
    values: dict[str, Any] = {}
    for layer in filled:
        ours = _our_name(layer.name) if names is None else names[layer.name]
        for kind, (last,) in _PARTS.items():
            array = getattr(layer, kind)
            if array is not None:
                values[f"{ours}.{last}" if ours else last] = torch.from_numpy(array.copy())
        values[f"{ours}.{_COUNTER}" if ours else _COUNTER] = torch.tensor(layer.batches or 0)
    ours_options: dict[str, Any] = {"momentum": other(momentum), "eps": eps}
    if filled[0].weight is None:
        ours_options["affine"] = False
    elif filled[0].bias is None:
        ours_options["bias"] = False
    return Translation(values, ours_options, tuple(layer.name for layer in layers), (*notes, *missing))


def to_framework(
    framework: str,
    state_dict: Mapping[str, Any],
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    names: Mapping[str, str] | None = None,
    count: Count | None = None,
    counter: int | None = None,
    shape: Sequence[int] | None = None,
    **options: Any,
) -> Translation:
    r"""The batch norm layers of a state dict as variables and options of Keras, TensorFlow, Flax, Haiku or Equinox.

    The reverse of `from_framework`, which has the table of frameworks and what a momentum, a variance and a count mean:
    `to_framework(name, found.values, **found.options)` gives the arrays that `found` came from.

    Args:
        framework: a name from the table.
        state_dict: of one layer or of a whole model. What belongs to no batch norm is left out.
        momentum: that of the layers, the weight of the new batch.
        eps: that of the layers.
        names: from the modules' names here to those of the layers there. Modules without an entry are left out. None
            keeps the names, "." replaced by "/".
        count: n, the values that a channel had in a training batch, to convert the unbiased variance into the biased
            one of that framework; None leaves it as it is, with the same output in evaluation. Or a dictionary from
            the modules' names to such numbers.
        counter: Haiku and Equinox (mode="batch"): t, the batches their averages count. None for so many that
            1 − mᵗ is 1 and they move by `momentum` as ours do. To bring back what came from there, give its own.
        shape: that of their arrays with -1 for the channels; None for (-1,). Haiku's have the rank of the layer's input
            and need it: (1, 1, 1, -1) for images with channels last.
        options: those of the table but for momentum and ε: scale=False, say, leaves out a γ that is 1 everywhere,
            fused=False and mode="ema" choose the convention. affine and bias, as in a `Translation`'s options, are
            compared with the state dict.

    Returns:
        A `Translation`. `values` are new numpy arrays: by flat names for Keras and TensorFlow, as `{"params": ...,
        "batch_stats": ...}` for Flax, merged for nnx, as `{"params": ..., "state": ...}` for Haiku, by attributes of
        the layer for Equinox. γ and β that are missing here are missing there.

    Raises:
        InputError: an unknown framework, option or name; no batch norm in the state dict; momentum=None, the plain
            average, which none of them has.
        InputTypeError: something that is no array, no mapping or no number.

    Source:
        docs/frameworks.md, with the place in each framework's source.

    Example:
        >>> import torch, batchnorm
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), batchnorm.BatchNorm2d(4))
        >>> there = batchnorm.to_framework("keras", net.state_dict(), names={"1": "bn"})
        >>> sorted(there.values), there.options["momentum"], there.options["epsilon"]
        (['bn/beta', 'bn/gamma', 'bn/moving_mean', 'bn/moving_variance'], 0.9, 1e-05)
    """
    convention = convention_of(framework, options)
    theirs, epsilon = other(number("momentum", momentum, 0, 1)), number("eps", eps, 0, math.inf)
    layers, others = _read_state(state_dict)
    has = _has(convention, layers, options)
    notes = [f"left alone: {others} other entr{'ies' if others > 1 else 'y'}"] if others else []
    _check_count(count, layers)
    layers = _chosen(layers, names)
    if not convention.unbiased:
        if count is None:
            notes.append(
                "the variance is as it was, so that evaluation gives the same: PyTorch's layers keep the unbiased "
                f"one, {framework} the biased one, (n - 1)/n times as large; give count=n to have it converted"
            )
        layers = [scaled(layer, count, lambda n: (n - 1) / n) for layer in layers]
    if convention.counter is not None:
        batches = plain(theirs, framework) if counter is None else whole("counter", counter)
        share = share_of(convention, batches, theirs)
        layers = [replace(layer, batches=batches, share=share) for layer in layers]
    filled, missing = fill(layers, *has)
    renamed = [
        replace(each, name=_their_name(each.name) if names is None else names[each.name]) for each in filled
    ]
    values = write(convention, renamed, shape)
    their_options: dict[str, Any] = {convention.momentum: theirs, convention.eps: epsilon}
    their_options |= {convention.has_weight: has[0], convention.has_bias: has[1]}
    if "mode" in convention.switches:
        their_options["mode"] = convention.switches["mode"]
    return Translation(values, their_options, tuple(layer.name for layer in layers), (*notes, *missing))


def _moved_by(convention: Convention, options: dict[str, Any]) -> tuple[float, float]:
    """Their momentum and ε; what is left of the options says whether there are γ and β."""
    known = [convention.momentum, convention.eps, convention.has_weight, convention.has_bias]
    for name in options:
        if name not in known:
            raise InputError(
                message(
                    f"option of {convention.name}",
                    got=name,
                    expected=", ".join(dict.fromkeys([*known, *convention.switches])),
                    fix="Options have the names of that framework's own layer.",
                )
            )
    momentum = options.get(convention.momentum, convention.default_momentum)
    if momentum is None:
        raise InputError(
            message(
                f"{convention.momentum} of {convention.name}",
                got="None",
                expected="the number the layer was built with, which has no default there",
            )
        )
    eps = options.get(convention.eps, convention.default_eps)
    return number(convention.momentum, momentum, 0, 1), number(convention.eps, eps, 0, math.inf)


def _check_has(convention: Convention, options: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    for name, kind, part in (
        (convention.has_weight, "weight", convention.weight),
        (convention.has_bias, "bias", convention.bias),
    ):
        there = any(getattr(layer, kind) is not None for layer in layers)
        if name in options and bool(options[name]) != there:
            got = f"{name}={options[name]} and {'' if there else 'no '}{part[0]} among the variables"
            raise InputError(message(f"options of {convention.name}", got=got, expected="options that agree"))


def _has(convention: Convention, layers: Sequence[Layer], options: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether their layers are to have γ and β: as the options say, by our names or by theirs, or as ours have them."""
    weight, bias = (any(getattr(layer, kind) is not None for layer in layers) for kind in ("weight", "bias"))
    known = {"affine": weight, "bias": bias or not weight}
    for name, value in options.items():
        if name in known and bool(value) != known[name]:
            got = f"{name}={value} and a state dict that says {known[name]}"
            raise InputError(message("options", got=got, expected="options that agree with the state dict"))
        if name not in (*known, convention.has_weight, convention.has_bias):
            theirs = (*known, convention.has_weight, convention.has_bias, *convention.switches)
            raise InputError(
                message(f"option for {convention.name}", got=name, expected=", ".join(dict.fromkeys(theirs)))
            )
    weight = bool(options.get(convention.has_weight, weight or (bias and not convention.bias_alone)))
    bias = bool(options.get(convention.has_bias, bias or (weight and not convention.weight_alone)))
    return weight, bias


def _read_state(state_dict: Any) -> tuple[list[Layer], int]:
    if not isinstance(state_dict, Mapping):
        raise InputTypeError(
            message(
                "state_dict",
                got=f"a {type(state_dict).__name__}",
                expected="a state dict",
                fix="Give model.state_dict().",
            )
        )
    layers, taken = [], 0
    for name in state_dict:
        prefix, _, last = name.rpartition(".")
        start = f"{prefix}." if prefix else ""
        if last != "running_mean" or state_dict.get(f"{start}running_var") is None:
            continue
        parts: dict[str, Any] = {
            kind: as_vector(f"{start}{own}", state_dict[f"{start}{own}"])
            for kind, (own,) in _PARTS.items()
            if state_dict.get(f"{start}{own}") is not None
        }
        taken += len(parts) + (f"{start}{_COUNTER}" in state_dict)
        layers.append(Layer(prefix, **parts))
        check(layers[-1], _PARTS)
    if not layers:
        raise InputError(
            message("state_dict", got="no running_mean and running_var", expected="those of a batch norm")
        )
    return layers, len(state_dict) - taken


def _chosen(layers: list[Layer], names: Mapping[str, str] | None) -> list[Layer]:
    if names is None:
        return layers
    known = [layer.name for layer in layers]
    for name in names:
        if name not in known:
            shown = ", ".join(map(repr, known[:5])) + (", …" if len(known) > 5 else "")
            raise InputError(message("names", got=repr(name), expected=f"names of batch norms: {shown}"))
    if len(set(names.values())) < len(names) or not names:
        got = "one name twice" if names else "none"
        raise InputError(message("names", got=got, expected="another name for each layer"))
    return [layer for layer in layers if layer.name in names]


def _our_name(name: str) -> str:
    return ".".join(part for part in name.split("/") if part != "~")


def _their_name(name: str) -> str:
    return name.replace(".", "/")


def _check_count(count: Count | None, layers: Sequence[Layer]) -> None:
    for name in count if isinstance(count, Mapping) else ():
        if name not in [layer.name for layer in layers]:
            raise InputError(message("count", got=repr(name), expected="the names of the layers"))


def _about_training(
    convention: Convention, layers: Sequence[Layer], momentum: float, count: Count | None
) -> list[str]:
    """What holds in evaluation but not in further training."""
    notes = []
    if not convention.unbiased and count is None:
        notes.append(
            f"the variance is as it was, so that evaluation gives the same: {convention.name} keeps the biased one, "
            "PyTorch's layers the unbiased one, n/(n - 1) times as large; give count=n to have it converted"
        )
    dropped = sorted({name for layer in layers for name in layer.dropped if "/" not in name})
    if dropped:
        notes.append(f"left out: {', '.join(dropped)}, with which their layer trains; evaluation is the same")
    if convention.switches.get("mode") == "ema":
        notes.append(
            "mode='ema' trains with the running statistics, ours with the batch's; evaluation is the same"
        )
    for layer in layers:
        weight = next_weight(momentum, layer.batches)
        if weight is not None:
            notes.append(
                f"after {layer.batches} batches{where([layer.name])} their average counts the next one with "
                f"{weight:.4g} (it is corrected for its start), ours with {other(momentum):g}"
            )
            break
    return notes

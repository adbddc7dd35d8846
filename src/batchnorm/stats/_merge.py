"""`merge_statistics`: state dicts of one network trained in several places, as one."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from batchnorm._errors import InputError, InputTypeError, ModelError, message

__all__ = ["merge_statistics"]

Count = float | Mapping[str, float]
_MEAN, _VAR, _COUNTER = "running_mean", "running_var", "num_batches_tracked"


def merge_statistics(state_dicts: Sequence[Mapping[str, Any]], counts: Sequence[Count]) -> dict[str, Any]:
    r"""One state dict from those of several clients, processes or shards, with exact running statistics.

    $$\mu = \frac{\sum_i n_i \mu_i}{N}, \qquad
    \sigma^2 = \frac{\sum_i (n_i - 1) \sigma_i^2 + \sum_i n_i (\mu_i - \mu)^2}{N - 1}, \qquad N = \sum_i n_i$$

    per channel, in float64: the mean and the unbiased variance of all the data together. An average of the variances
    would leave out the second sum, what lies between the means.

    The other floating-point entries, weights among them, are averaged by count, as federated averaging does; where they
    are equal, they stay what they are, bit by bit. num_batches_tracked is summed: the merged statistics come from that
    many batches. All other integers and booleans, and whatever is no tensor, must be equal.

    After weights that differ have been averaged, no merged statistics are those of the new network: `recalibrate` it
    if there are data.

    Args:
        state_dicts: of the same network, at least one. They are not changed.
        counts: one number for each, nᵢ: how many values of a channel went into its statistics. Samples will do where
            layers also have positions, unless there are only a few: the error is of the order 1/n. Or a dictionary from
            the names of the layers ("layer1.0.bn1") to such numbers; weights are then averaged by the largest. 0 for a
            client without data: nothing of it counts, NaN included.

    Returns:
        A new state dict in the order, the dtypes and on the devices of the first.

    Raises:
        InputError: no state dicts, not as many counts, a negative count, all of them 0.
        InputTypeError: something else than state dicts and numbers.
        ModelError: names, shapes or integers that differ: not the same network.

    Source:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.

    Example:
        >>> import torch, batchnorm
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [10.0], [12.0]])
        >>> def trained(part):
        ...     layer = torch.nn.BatchNorm1d(1, momentum=None)
        ...     layer(part)
        ...     return layer.state_dict()
        >>> merged = batchnorm.merge_statistics([trained(x[:3]), trained(x[3:])], [3, 2])
        >>> merged["running_mean"].item(), round(merged["running_var"].item(), 4), round(x.var().item(), 4)
        (5.599999904632568, 25.3, 25.3)
    """
    states = list(state_dicts)
    if not isinstance(counts, Iterable):
        raise InputTypeError(
            message(
                "counts", got=f"a {type(counts).__name__}", expected="a list with one for each state dict"
            )
        )
    _check(states, list(counts))
    layers = _layers(states[0])
    _check_names(counts, layers)
    general = [
        max(count.values(), default=0) if isinstance(count, Mapping) else float(count) for count in counts
    ]
    merged: dict[str, Any] = copy.copy(cast(dict[str, Any], states[0]))  # with its _metadata
    used = [i for i, n in enumerate(general) if n > 0]
    for name, first in states[0].items():
        values = [states[i][name] for i in used]
        layer, _, last = name.rpartition(".")
        if layer in layers and last in (_MEAN, _VAR):
            continue
        if layer in layers and last == _COUNTER:
            merged[name] = torch.stack([value.to(first.device) for value in values]).sum(0)
        elif isinstance(first, Tensor) and (first.is_floating_point() or first.is_complex()):
            merged[name] = _average(values, [general[i] for i in used], first)
        else:
            _check_equal(name, values)
            merged[name] = first.clone() if isinstance(first, Tensor) else first
    for layer in layers:
        own = [_count_of(count, layer) for count in counts]
        mean, var = _pooled(states, own, layer)
        merged[_key(layer, _MEAN)], merged[_key(layer, _VAR)] = mean, var
    return merged


def _layers(state: Mapping[str, Any]) -> list[str]:
    """The names of what keeps a running mean and a running variance."""
    found = [name.rpartition(".")[0] for name in state if name.rpartition(".")[2] == _MEAN]
    return [layer for layer in found if isinstance(state.get(_key(layer, _VAR)), Tensor)]


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _pooled(
    states: Sequence[Mapping[str, Any]], counts: Sequence[float], layer: str
) -> tuple[Tensor, Tensor]:
    first_mean, first_var = states[0][_key(layer, _MEAN)], states[0][_key(layer, _VAR)]
    total = sum(counts)
    if total <= 0:
        raise InputError(message(f"counts of {layer or 'the model'}", got="0 in all", expected="more than 0"))
    known = [(n, state) for n, state in zip(counts, states, strict=True) if n > 0]
    weights = torch.tensor([n for n, _ in known], dtype=torch.float64).unsqueeze(1)
    means = torch.stack([state[_key(layer, _MEAN)].detach().cpu().double() for _, state in known])
    variances = torch.stack([state[_key(layer, _VAR)].detach().cpu().double() for _, state in known])
    # About one of the means, so that a common offset costs no digits.
    mean = means[0] + (weights * (means - means[0])).sum(0) / total
    within = ((weights - 1).clamp_min(0) * variances).sum(0)
    m2 = within + (weights * (means - mean).square()).sum(0)
    # One value has no variance: PyTorch's layers then leave theirs alone.
    var = m2 / (total - 1) if total > 1 else variances[0]
    return mean.to(first_mean), var.to(first_var)


def _average(values: Sequence[Tensor], counts: Sequence[float], like: Tensor) -> Tensor:
    wide = torch.complex128 if like.is_complex() else torch.float64
    first = values[0].detach().cpu().to(wide)
    total, moved = sum(counts), torch.zeros_like(first)
    for value, count in zip(values, counts, strict=True):
        moved += (value.detach().cpu().to(wide) - first) * (count / total)
    return (first + moved).to(like)


def _count_of(count: Count, layer: str) -> float:
    if not isinstance(count, Mapping):
        return float(count)
    if layer not in count:
        raise InputError(
            message(
                "counts", got=f"none for {layer or 'the model'}", expected="one for every batch norm layer"
            )
        )
    return float(count[layer])


def _check_names(counts: Sequence[Count], layers: Sequence[str]) -> None:
    for count in counts:
        unknown = [name for name in count if name not in layers] if isinstance(count, Mapping) else []
        if unknown:
            known = ", ".join(layers[:5]) + (", …" if len(layers) > 5 else "")
            raise InputError(
                message("counts", got=repr(unknown[0]), expected=f"the names of batch norm layers: {known}")
            )


def _check(states: Sequence[Any], counts: Sequence[Any]) -> None:
    if not states:
        raise InputError(message("state_dicts", got="none", expected="at least one"))
    if len(states) != len(counts):
        raise InputError(
            message("counts", got=f"{len(counts)} for {len(states)} state dicts", expected="one for each")
        )
    for state in states:
        if not isinstance(state, Mapping):
            raise InputTypeError(
                message(
                    "state_dicts",
                    got=f"a {type(state).__name__}",
                    expected="state dicts",
                    fix="Give model.state_dict().",
                )
            )
    for count in counts:
        _check_count(count)
    if not any(max(c.values(), default=0) if isinstance(c, Mapping) else c for c in counts):
        raise InputError(message("counts", got="0 for all", expected="data somewhere"))
    for number, state in enumerate(states[1:], 1):
        _check_like(states[0], state, number)


def _check_count(count: Any) -> None:
    numbers = list(count.values()) if isinstance(count, Mapping) else [count]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            fix = "Give counts.tolist()." if isinstance(number, Tensor) else ""
            raise InputTypeError(
                message("counts", got=f"a {type(number).__name__}", expected="numbers", fix=fix)
            )
        if not 0 <= number < math.inf:
            raise InputError(message("counts", got=number, expected="finite numbers ≥ 0"))


def _check_like(first: Mapping[str, Any], other: Mapping[str, Any], number: int) -> None:
    where = f"state dict {number}"
    different = sorted(set(first) ^ set(other))
    if different:
        name = different[0]
        got = f"no {name}" if name in first else f"{name}, which state dict 0 has not"
        raise ModelError(message(where, got=got, expected="the entries of state dict 0"))
    for name, value in first.items():
        shape, its = getattr(value, "shape", None), getattr(other[name], "shape", None)
        if shape != its:
            got = "no tensor" if its is None else f"shape {tuple(its)}"
            raise ModelError(
                message(
                    f"{where}: {name}", got=got, expected="what state dict 0 has", fix="Merge one network."
                )
            )


def _check_equal(name: str, values: Sequence[Any]) -> None:
    first = values[0]
    for value in values[1:]:
        same = torch.equal(value.to(first.device), first) if isinstance(first, Tensor) else value == first
        if not same:
            raise ModelError(
                message(
                    name,
                    got="values that differ and are no floating-point numbers",
                    expected="equal ones",
                    fix="Take the entry out, or make it the same everywhere.",
                )
            )

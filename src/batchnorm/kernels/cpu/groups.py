"""Groups of consecutive samples, each with statistics of its own: the kernels run once a group.

A group is a slice of the batch, dense in both memory layouts, and is handed over without a copy.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.cpu.tensors import DOUBLE, WITH_BITS, back, see

__all__ = ["backward", "forward", "grad_input", "grad_sums", "moments", "normalize"]

Kernel = Callable[..., Any]


def _rows(input: Tensor, groups: int) -> Iterator[slice]:
    """The samples of each group."""
    size = input.shape[0] // groups
    return (slice(group * size, (group + 1) * size) for group in range(groups))


def _of(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _parameter(parameter: Tensor | None, group: int) -> Tensor | None:
    """A group's own of (G, C), or the (C,) that all share."""
    return parameter[group] if parameter is not None and parameter.dim() == 2 else parameter


def _joined(bits: list[Tensor], elements: int) -> Tensor:
    """The bits of the whole batch from those of its groups, `elements` each."""
    if elements % 8 == 0:
        return torch.cat(bits)
    on = torch.cat([_unpacked(part)[:elements] for part in bits])
    return _packed(on)


def _apart(bits: Tensor, elements: int, group: int) -> Tensor:
    """The bits of one group from those of the batch."""
    first = group * elements
    if elements % 8 == 0:
        return bits[first // 8 : (first + elements) // 8]
    near = _unpacked(bits[first // 8 : (first + elements + 7) // 8])
    return _packed(near[first % 8 : first % 8 + elements])


def _unpacked(bits: Tensor) -> Tensor:
    return ((bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)


def _packed(on: Tensor) -> Tensor:
    eights = torch.nn.functional.pad(on, (0, -on.numel() % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _kept(kept: Tensor, residual: bool, activation: str | None, rows: slice, x: Tensor, group: int) -> Tensor:
    """What one group's backward asks for of `kept`: bits, or samples of the residual."""
    if not residual or activation is None:
        return kept
    if activation in WITH_BITS:
        return _apart(kept, x[rows].numel(), group)
    return kept[rows]


def moments(one: Kernel, input: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """`one` for each group: mean and m2 (G, C), count (G, 1)."""
    found = [one(input[rows], _of(mask, rows), 1) for rows in _rows(input, groups)]
    mean, m2, count = map(torch.cat, zip(*found, strict=True))
    return mean, m2, count


def _outputs(
    input: Tensor,
    residual: Tensor | None,
    activation: str | None,
    groups: int,
    run: Callable[[Tensor, slice, int, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """The output, whatever `run` finds for a group beside it, and the bits, of the whole batch.

    `run` is given the samples of a group and the memory of its output.
    """
    x = see(input)[0]
    y = torch.empty_like(x)
    others = [run(x[rows], rows, group, y[rows]) for group, rows in enumerate(_rows(x, groups))]
    *statistics, bits = ([*column] for column in zip(*others, strict=True))
    packed = residual is not None and activation in WITH_BITS
    saved = _joined(bits, x.numel() // groups) if packed and x.numel() else torch.empty(0, dtype=torch.uint8)
    return (back(y, input), *map(torch.cat, statistics), saved)


def forward(
    one: Kernel,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    groups: int,
    eps: float,
    *rule: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`one` for each group: (output, mean, var, count, saved)."""

    def run(x: Tensor, rows: slice, group: int, y: Tensor) -> tuple[Tensor, ...]:
        parameters = _parameter(weight, group), _parameter(bias, group)
        output, *found = one(x, *parameters, _of(residual, rows), _of(mask, rows), 1, eps, *rule)
        y.copy_(output)
        return tuple(found)

    y, mean, var, count, saved = _outputs(input, residual, rule[0], groups, run)
    return y, mean, var, count, saved


def normalize(
    one: Kernel,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    """`one` for each group: (output, saved)."""

    def run(x: Tensor, rows: slice, group: int, y: Tensor) -> tuple[Tensor, ...]:
        parameters = _parameter(weight, group), _parameter(bias, group)
        given = mean[group : group + 1], invstd[group : group + 1]
        return one(x, *given, *parameters, _of(residual, rows), _of(mask, rows), *rule, y)[1:]  # type: ignore[no-any-return]

    y, saved = _outputs(input, residual, rule[0], mean.shape[0], run)
    return y, saved


def _gradient_of(parameter: Tensor | None, found: list[Tensor]) -> Tensor:
    """Gradients (C,) of every group, in float64, as the gradient of the parameter."""
    if parameter is None:
        return found[0]
    every = torch.stack(found)
    return (every if parameter.dim() == 2 else every.sum(0)).to(parameter.dtype)


def backward(
    one: Kernel,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    eps: float,
    *rule: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`one` for each group: (grad_input, grad_weight, grad_bias, grad_residual)."""
    x = see(input)[0]
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if residual else x.new_empty(0)
    # In float64, because several groups add to one parameter.
    wide = tuple(None if parameter is None else parameter.to(DOUBLE) for parameter in (weight, bias))
    dweights, dbiases = [], []
    for group, rows in enumerate(_rows(x, mean.shape[0])):
        own = slice(group, group + 1)
        part, dweight, dbias, added = one(
            grad_output[rows], x[rows], mean[own], var[own], count[own], *(_parameter(p, group) for p in wide),
            _kept(kept, residual, rule[0], rows, x, group), residual, _of(mask, rows), eps, *rule,
        )  # fmt: skip
        dx[rows] = part
        if residual:
            dresidual[rows] = added
        dweights.append(dweight)
        dbiases.append(dbias)
    return (
        back(dx, input),
        _gradient_of(weight, dweights),
        _gradient_of(bias, dbiases),
        back(dresidual, input) if residual else dresidual,
    )


def grad_sums(
    one: Kernel,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    """`one` for each group: Σg and Σg·x̂, both (G, C)."""
    x = see(input)[0]
    found = []
    for group, rows in enumerate(_rows(x, mean.shape[0])):
        own = slice(group, group + 1)
        found.append(
            one(
                grad_output[rows], x[rows], mean[own], invstd[own], _parameter(weight, group), _parameter(bias, group),
                _kept(kept, residual, rule[0], rows, x, group), residual, _of(mask, rows), *rule,
            )
        )  # fmt: skip
    sum_grad, sum_grad_xhat = map(torch.cat, zip(*found, strict=True))
    return sum_grad, sum_grad_xhat


def grad_input(
    one: Kernel,
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    sum_grad: Tensor,
    sum_grad_xhat: Tensor,
    count: Tensor,
    *rule: Any,
) -> tuple[Tensor, Tensor]:
    """`one` for each group: (grad_input, grad_residual)."""
    x = see(input)[0]
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if residual else x.new_empty(0)
    for group, rows in enumerate(_rows(x, mean.shape[0])):
        own = slice(group, group + 1)
        _, added = one(
            grad_output[rows], x[rows], mean[own], invstd[own], _parameter(weight, group), _parameter(bias, group),
            _kept(kept, residual, rule[0], rows, x, group), residual, _of(mask, rows), sum_grad[own],
            sum_grad_xhat[own], count[own], *rule, dx[rows],
        )  # fmt: skip
        if residual:
            dresidual[rows] = added
    return back(dx, input), back(dresidual, input) if residual else dresidual

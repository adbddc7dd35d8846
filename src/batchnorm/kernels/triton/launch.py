"""The Triton kernels under the names and signatures of `batchnorm.reference`, and compositions of them for training.

Two launches a direction, forward and backward. Results are allocated here, in the memory layout of the input; input,
gradients and residuals that are not dense in one memory order are copied first. Nothing asks the device for a number.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.triton.given import (
    eval_forward,
    grad_input,
    grad_sums,
    moments,
    normalize,
    update_running_,
)
from batchnorm.kernels.triton.grad_input import grad_input_into
from batchnorm.kernels.triton.grad_sums import Sums, find_sums, operands_of
from batchnorm.kernels.triton.moments import Found, find_moments
from batchnorm.kernels.triton.normalize import normalize_into
from batchnorm.kernels.triton.running import rule_of
from batchnorm.kernels.triton.tensors import (
    DOUBLE,
    FLOATS,
    back,
    beside,
    count_of_nothing,
    even,
    frequencies,
    numbers,
    on_its_device,
    plain,
    present,
    room_for_bits,
    see,
    unpack,
)

__all__ = [
    "backward",
    "eval_forward",
    "forward",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
    "train_backward",
    "train_forward",
    "unpack",
    "update_running_",
]


@on_its_device
def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training: (output, mean, var, count, saved)."""
    mean, var, invstd = (input.new_empty(groups, input.shape[1], dtype=DOUBLE) for _ in range(3))
    count = input.new_empty(groups, 1, dtype=DOUBLE)
    if input.numel() == 0:
        count = count_of_nothing(input, mask, count)
        return torch.empty_like(input), mean.zero_(), var.zero_(), count, present(None, input)
    seen = see(input, groups, eps)
    weights = frequencies(mask, seen.wide)
    find_moments(seen, weights, Found(mean, var, invstd, count), eps, None, keep=False)
    y = torch.empty_like(seen.x)
    residual = None if residual is None else beside(residual, seen.x)
    bits = room_for_bits(seen.x, residual, activation)
    normalize_into(
        y,
        seen,
        (mean, invstd),
        None,
        (plain(weight), plain(bias)),
        residual,
        bits,
        weights,
        activation,
        slope,
    )
    return back(y, input), mean, var, count, present(bits, input)


@on_its_device
def backward(
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
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training: (grad_input, grad_weight, grad_bias, grad_residual); empty where there is nothing to differentiate."""
    if input.numel() == 0:
        nothing = input.new_empty(0, dtype=DOUBLE)
        dweight, dbias = (nothing if p is None else torch.zeros_like(p) for p in (weight, bias))
        empty = torch.empty_like(input) if residual else input.new_empty(0)
        return torch.empty_like(input), dweight, dbias, empty
    groups = mean.shape[0]
    seen = see(input, groups, eps)
    operands = operands_of(seen, grad_output, weight, bias, kept, residual, mask, activation, slope)
    mean, var = numbers(mean), numbers(var)
    sum_grad, sum_grad_xhat, invstd = (torch.empty_like(mean) for _ in range(3))
    written = tuple(_written(p, groups) for p in (weight, bias))
    sums = Sums(sum_grad, sum_grad_xhat, invstd, *written)
    find_sums(seen, operands, (mean, var), eps, sums, given=False, keep=False)
    dx = torch.empty_like(seen.x)
    dresidual = torch.empty_like(seen.x) if residual else None
    grad_input_into(
        dx,
        dresidual,
        seen,
        operands,
        (mean, invstd),
        (sum_grad, sum_grad_xhat),
        None if mask is None else count,
    )
    return (
        back(dx, input),
        _gradient(weight, written[0], sum_grad_xhat),
        _gradient(bias, written[1], sum_grad),
        input.new_empty(0) if dresidual is None else back(dresidual, input),
    )


def _written(parameter: Tensor | None, groups: int) -> Tensor | None:
    """Room for a gradient that the reduction itself can write: not where several groups add to one parameter."""
    if parameter is None or (groups > 1 and parameter.dim() == 1) or parameter.dtype not in FLOATS:
        return None
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _gradient(parameter: Tensor | None, written: Tensor | None, sums: Tensor) -> Tensor:
    if parameter is None:
        return sums.new_empty(0)
    if written is not None:
        return written
    return (sums if parameter.dim() == 2 else sums.sum(0)).to(parameter.dtype)


@on_its_device
def train_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Any,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """(output, bits, (mean, 1/σ)); counts the batch and moves the running statistics in the same two launches."""
    if input.numel() == 0 or (running is not None and not _can_move(*running[:3])):
        return _train_forward_in_parts(input, weight, bias, residual, running, eps, activation, slope)
    seen = see(input, 1, eps)
    mean, var, invstd = input.new_empty(3, even(input.shape[1]), dtype=DOUBLE).unbind()
    rule = None if running is None else rule_of(*running)
    find_moments(seen, None, Found(mean, var, invstd), eps, rule, keep=True)
    y = torch.empty_like(seen.x)
    residual = None if residual is None else beside(residual, seen.x)
    bits = room_for_bits(seen.x, residual, activation)
    tracked = None if rule is None else rule.buffers[2]
    normalize_into(
        y,
        seen,
        (mean, invstd),
        None,
        (plain(weight), plain(bias)),
        residual,
        bits,
        None,
        activation,
        slope,
        tracked,
    )
    if rule is not None:  # autograd must notice that they changed
        torch._C._increment_version([buffer for buffer in rule.buffers if buffer is not None])
    return back(y, input), bits, (mean, invstd)


def _can_move(mean: Tensor, var: Tensor, tracked: Tensor | None) -> bool:
    """Whether the kernels can write to these buffers."""
    return (
        mean.is_contiguous()
        and var.is_contiguous()
        and mean.dtype in FLOATS
        and var.dtype in FLOATS
        and (tracked is None or tracked.dtype == torch.int64)
    )


def _train_forward_in_parts(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Any,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """`train_forward` for an empty batch and for buffers that the kernels cannot write to."""
    y, mean, var, count, saved = forward(input, weight, bias, residual, None, 1, eps, activation, slope)
    if running is not None:
        running_mean, running_var, tracked, momentum, skip = running
        if tracked is not None:
            tracked.add_(1)
        update_running_(running_mean, running_var, tracked, mean, var, count, momentum, skip)
    return y, saved if saved.numel() else None, (mean[0], (var[0] + eps).rsqrt())


@on_its_device
def train_backward(
    grad_output: Tensor,
    input: Tensor,
    statistics: tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    residual: bool,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `train_forward`, None for what there is not."""
    if input.numel() == 0:
        zeros = (None if p is None else torch.zeros_like(p) for p in (weight, bias))
        return torch.empty_like(input), *zeros, torch.empty_like(input) if residual else None  # type: ignore[return-value]
    seen = see(input, 1, eps)
    operands = operands_of(seen, grad_output, weight, bias, kept, residual, None, activation, slope)
    channels = input.shape[1]
    sums = input.new_empty(2, even(channels), dtype=DOUBLE).unbind()
    dweight, dbias = _written(weight, 1), _written(bias, 1)
    find_sums(
        seen, operands, statistics, None, Sums(sums[0], sums[1], None, dweight, dbias), given=False, keep=True
    )
    dx = torch.empty_like(seen.x)
    dresidual = torch.empty_like(seen.x) if residual else None
    grad_input_into(dx, dresidual, seen, operands, statistics, (sums[0], sums[1]), None)
    return (
        back(dx, input),
        dweight if weight is None or dweight is not None else sums[1][:channels].to(weight.dtype),
        dbias if bias is None or dbias is not None else sums[0][:channels].to(bias.dtype),
        None if dresidual is None else back(dresidual, input),
    )

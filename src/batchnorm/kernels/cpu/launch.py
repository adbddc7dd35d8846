"""The CPU kernels under the names and signatures of `batchnorm.reference`, and two compositions of them.

A tensor is handed over as an address and a shape: `last` says that the channel is the fastest axis (2-D and
channels-last input), else memory is (N, C, S). Input that is neither is copied. Results are allocated here, in the
memory layout of the input. silu and gelu are PyTorch's operators behind the kernel (before it, in backward).
"""

from math import nan
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.cpu import extension
from batchnorm.kernels.cpu import groups as by_group
from batchnorm.kernels.cpu.given import (
    eval_forward,
    grad_input,
    grad_sums,
    moments,
    normalize,
    unpack,
    update_running_,
)
from batchnorm.kernels.cpu.tensors import (
    ACTIVATIONS,
    BEFORE,
    BEHIND,
    CODES,
    DOUBLE,
    WITH_BITS,
    arithmetic,
    back,
    beside,
    frequencies,
    numbers,
    room_for_bits,
    see,
    vector,
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

_cpu: Any = extension()


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    statistics: tuple[int, int],
    running: tuple[int, int, int, int, float, bool] = (0, 0, 0, 0, 0.0, False),
) -> tuple[Tensor, Tensor | None, float]:
    """(output, bits, count), with mean and var written to the two addresses."""
    if (residual is not None or activation in BEHIND) and (
        wide := arithmetic(input, residual, mask, activation)
    ) != input.dtype:
        y, bits, count = _forward(
            input.to(wide), weight, bias, residual, mask, eps, activation, slope, statistics, running
        )
        return back(y, input), bits, count
    x, last, n, c, s = see(input)
    y = torch.empty_like(x)
    w, w_code, _w = vector(weight)
    b, b_code, _b = vector(bias)
    bits, r, kept = None, 0, 0
    if residual is not None:
        residual = beside(residual, x)
        bits = room_for_bits(x, residual, activation)
        r, kept = residual.data_ptr(), bits.data_ptr()
    act = ACTIVATIONS.get(activation, 0)
    code = CODES[x.dtype]
    frequency, _frequencies = frequencies(mask)
    count = _cpu.train_forward(
        code, last, n, c, s, x.data_ptr(), frequency, w, w_code, b, b_code, r, y.data_ptr(), kept, act, slope, eps,
        *statistics, *running,
    )  # fmt: skip
    if activation in BEHIND:
        BEHIND[activation](y)
    return (y if x is input else back(y, input)), bits, count


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
    if groups != 1:
        return by_group.forward(forward, input, weight, bias, residual, mask, groups, eps, activation, slope)
    channels = input.shape[1]
    mean, var = torch.empty(1, channels, dtype=DOUBLE), torch.empty(1, channels, dtype=DOUBLE)
    y, bits, n = _forward(
        input, weight, bias, residual, mask, eps, activation, slope, (mean.data_ptr(), var.data_ptr())
    )
    count = torch.full((1, 1), n, dtype=DOUBLE)
    return y, mean, var, count, torch.empty(0, dtype=torch.uint8) if bits is None else bits


def train_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Any,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(output, bits, statistics (2, C)); counts the batch and moves the running statistics in the same call."""
    channels = input.shape[1]
    statistics = torch.empty(2, channels, dtype=DOUBLE)
    mean = statistics.data_ptr()
    addresses = (mean, mean + 8 * channels)
    if running is None:
        y, bits, _ = _forward(input, weight, bias, residual, None, eps, activation, slope, addresses)
        return y, bits, statistics
    running_mean, running_var, tracked, momentum, skip = running
    dtype = running_mean.dtype
    if (
        dtype == running_var.dtype
        and dtype in CODES
        and running_mean.is_contiguous()
        and running_var.is_contiguous()
        and (tracked is None or tracked.dtype == torch.int64)
    ):
        moves = (
            running_mean.data_ptr(), running_var.data_ptr(), CODES[dtype],
            0 if tracked is None else tracked.data_ptr(), nan if momentum is None else momentum, skip,
        )  # fmt: skip
        y, bits, _ = _forward(input, weight, bias, residual, None, eps, activation, slope, addresses, moves)
        # Autograd must notice that they changed.
        torch._C._increment_version(
            (running_mean, running_var) if tracked is None else (running_mean, running_var, tracked)
        )
        return y, bits, statistics
    y, bits, n = _forward(input, weight, bias, residual, None, eps, activation, slope, addresses)
    if tracked is not None:
        tracked.add_(1)
    count = torch.full((1, 1), n, dtype=DOUBLE)
    update_running_(running_mean, running_var, tracked, statistics[:1], statistics[1:], count, momentum, skip)
    return y, bits, statistics


def _backward(
    grad_output: Tensor,
    input: Tensor,
    statistics: tuple[int, int],
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    residual: bool,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual)."""
    bits = residual and activation in WITH_BITS
    added = kept if residual and activation is not None and not bits else None
    if (added is not None or activation in BEHIND) and (
        wide := arithmetic(input, added, mask, activation)
    ) != input.dtype:
        dx, dweight, dbias, dresidual = _backward(
            grad_output,
            input.to(wide),
            statistics,
            weight,
            bias,
            kept,
            residual,
            mask,
            eps,
            activation,
            slope,
        )
        return back(dx, input), dweight, dbias, None if dresidual is None else back(dresidual, input)
    x, last, n, c, s = see(input)
    dy = grad_output
    if dy.dtype != x.dtype or dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    if added is not None:
        added = beside(added, x)
    frequency, _frequencies = frequencies(mask)
    w, w_code, w_alive = vector(weight)
    b, b_code, b_alive = vector(bias)
    dresidual = None
    if activation in BEHIND:
        z = torch.empty_like(x)
        _cpu.preactivation(
            CODES[x.dtype], last, n, c, s, x.data_ptr(), frequency, w, w_code, b, b_code,
            0 if added is None else added.data_ptr(), z.data_ptr(), eps, *statistics,
        )  # fmt: skip
        dy = BEFORE[activation](dy, z, grad_input=z)
        activation, added = None, None
        dresidual = dy if residual else None
        if mask is not None and residual:
            dresidual = torch.empty_like(x)  # less what stands under a weight of 0
    elif residual:
        dresidual = torch.empty_like(x)
    dx = torch.empty_like(x)
    dweight = None if w_alive is None else torch.empty_like(w_alive)
    dbias = None if b_alive is None else torch.empty_like(b_alive)
    _cpu.train_backward(
        CODES[x.dtype], last, n, c, s, x.data_ptr(), frequency, w, w_code, b, b_code, dy.data_ptr(),
        0 if added is None else added.data_ptr(), kept.data_ptr() if bits and kept is not None else 0,
        ACTIVATIONS[activation], slope, eps, *statistics, dx.data_ptr(),
        0 if dresidual is None or dresidual is dy else dresidual.data_ptr(),
        0 if dweight is None else dweight.data_ptr(), 0 if dbias is None else dbias.data_ptr(),
    )  # fmt: skip
    if x is not input:
        dx = back(dx, input)
        dresidual = None if dresidual is None else back(dresidual, input)
    if weight is not None and dweight is not None and dweight.dtype != weight.dtype:
        dweight = dweight.to(weight.dtype)
    if bias is not None and dbias is not None and dbias.dtype != bias.dtype:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def train_backward(
    grad_output: Tensor,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    residual: bool,
    eps: float,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `train_forward`, None for what there is not."""
    mean = statistics.data_ptr()
    addresses = (mean, mean + 8 * input.shape[1])
    return _backward(
        grad_output, input, addresses, weight, bias, kept, residual, None, eps, activation, slope
    )


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
    if mean.shape[0] != 1:
        return by_group.backward(
            backward,
            grad_output,
            input,
            mean,
            var,
            count,
            weight,
            bias,
            kept,
            residual,
            mask,
            eps,
            activation,
            slope,
        )
    mean, var = numbers(mean), numbers(var)
    dx, dweight, dbias, dresidual = _backward(
        grad_output, input, (mean.data_ptr(), var.data_ptr()), weight, bias, kept, residual, mask, eps, activation,
        slope,
    )  # fmt: skip
    return (
        dx,
        torch.empty(0, dtype=DOUBLE) if dweight is None else dweight,
        torch.empty(0, dtype=DOUBLE) if dbias is None else dbias,
        input.new_empty(0) if dresidual is None else dresidual,
    )

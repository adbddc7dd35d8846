"""The kernels with statistics given (eval mode, frozen layers, the four primitives) and what goes with them."""

from math import nan
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.cpu import extension
from batchnorm.kernels.cpu import groups as by_group
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
    "eval_forward",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
    "unpack",
    "update_running_",
]

_cpu: Any = extension()


def moments(input: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and m2 = Σ(x − mean)², both (1, C), and the count (1, 1)."""
    if groups != 1:
        return by_group.moments(moments, input, mask, groups)
    x, last, n, c, s = see(input)
    mean, m2 = torch.empty(1, c, dtype=DOUBLE), torch.empty(1, c, dtype=DOUBLE)
    frequency, _frequencies = frequencies(mask)
    count = _cpu.moments(
        CODES[x.dtype], last, n, c, s, x.data_ptr(), frequency, mean.data_ptr(), m2.data_ptr()
    )
    return mean, m2, torch.full((1, 1), count, dtype=DOUBLE)


def normalize(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Given statistics: (output, saved); the output in `out`, laid out as the input, where it is given."""
    if mean.shape[0] != 1:
        return by_group.normalize(
            normalize, input, mean, invstd, weight, bias, residual, mask, activation, slope
        )
    mean, invstd = numbers(mean), numbers(invstd)
    y, bits = _normalize(
        input,
        weight,
        bias,
        residual,
        mask,
        activation,
        slope,
        (mean.data_ptr(), invstd.data_ptr()),
        None,
        out,
    )
    return y, torch.empty(0, dtype=torch.uint8) if bits is None else bits


def eval_forward(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Given running statistics: (output, bits, (mean, invstd) as (2, C))."""
    channels = input.shape[1]
    statistics = torch.empty(2, channels, dtype=DOUBLE)
    mean = statistics.data_ptr()
    m, m_code, _m = vector(running_mean)
    v, v_code, _v = vector(running_var)
    y, bits = _normalize(
        input, weight, bias, residual, None, activation, slope, (mean, mean + 8 * channels),
        (eps, m, m_code, v, v_code), out,
    )  # fmt: skip
    return y, bits, statistics


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
    statistics: tuple[int, int],
    running: tuple[float, int, int, int, int] | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(output, bits) by (mean, invstd), which are written first where running statistics are given."""
    if (residual is not None or activation in BEHIND) and (
        wide := arithmetic(input, residual, mask, activation)
    ) != input.dtype:
        y, bits = _normalize(
            input.to(wide), weight, bias, residual, mask, activation, slope, statistics, running
        )
        return back(y, input) if out is None else out.copy_(y), bits
    x, last, n, c, s = see(input)
    y = torch.empty_like(x) if out is None or x is not input else out
    w, w_code, _w = vector(weight)
    b, b_code, _b = vector(bias)
    bits, r, kept = None, 0, 0
    if residual is not None:
        residual = beside(residual, x)
        bits = room_for_bits(x, residual, activation)
        r, kept = residual.data_ptr(), bits.data_ptr()
    frequency, _frequencies = frequencies(mask)
    common = (
        CODES[x.dtype], last, n, c, s, x.data_ptr(), frequency, w, w_code, b, b_code, r, y.data_ptr(), kept,
        ACTIVATIONS.get(activation, 0), slope,
    )  # fmt: skip
    if running is None:
        _cpu.normalize(*common, *statistics)
    else:
        _cpu.eval_forward(*common, *running, *statistics)
    if activation in BEHIND:
        BEHIND[activation](y)
    if x is input:
        return y, bits
    return back(y, input) if out is None else out.copy_(y), bits


def _gradient(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
) -> tuple[tuple[Any, ...], Tensor, Tensor | None, list[Tensor | None]]:
    """What grad_sums and grad_input share: (the kernels' arguments, x, g where it is known already, what must live)."""
    bits = residual and activation in WITH_BITS
    added = kept if residual and activation is not None and not bits else None
    wide = arithmetic(input, added, mask, activation)
    x, last, n, c, s = see(input if wide == input.dtype else input.to(wide))
    dy = beside(grad_output, x)
    added = None if added is None else beside(added, x)
    mean, invstd = numbers(mean), numbers(invstd)
    w, w_code, w_alive = vector(weight)
    b, b_code, b_alive = vector(bias)
    frequency, f_alive = frequencies(mask)
    before = (CODES[x.dtype], last, n, c, s, x.data_ptr(), frequency, w, w_code, b, b_code)
    known = None
    if activation in BEHIND:
        z = torch.empty_like(x)
        _cpu.normalize(
            *before, 0 if added is None else added.data_ptr(), z.data_ptr(), 0, 0, slope,
            mean.data_ptr(), invstd.data_ptr(),
        )  # fmt: skip
        dy = BEFORE[activation](dy, z, grad_input=z)
        known = dy if mask is None else None
        activation, added = None, None
    arguments = (
        *before, dy.data_ptr(), 0 if added is None else added.data_ptr(), kept.data_ptr() if bits else 0,
        ACTIVATIONS[activation], slope, mean.data_ptr(), invstd.data_ptr(),
    )  # fmt: skip
    return arguments, x, known, [x, dy, added, mean, invstd, w_alive, b_alive, f_alive]


def grad_sums(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor,
    residual: bool,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """Given statistics: Σg and Σg·x̂, both (1, C)."""
    if mean.shape[0] != 1:
        return by_group.grad_sums(
            grad_sums, grad_output, input, mean, invstd, weight, bias, kept, residual, mask, activation, slope
        )
    arguments, _, _, alive = _gradient(
        grad_output, input, mean, invstd, weight, bias, kept, residual, mask, activation, slope
    )
    sums = torch.empty_like(mean, dtype=DOUBLE), torch.empty_like(mean, dtype=DOUBLE)
    _cpu.grad_sums(*arguments, sums[0].data_ptr(), sums[1].data_ptr())
    del alive
    return sums


def grad_input(
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
    activation: str | None,
    slope: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Given statistics and sums: (grad_input, grad_residual); the first in `out`, where it is given."""
    if mean.shape[0] != 1:
        return by_group.grad_input(
            grad_input,
            grad_output,
            input,
            mean,
            invstd,
            weight,
            bias,
            kept,
            residual,
            mask,
            sum_grad,
            sum_grad_xhat,
            count,
            activation,
            slope,
        )
    arguments, x, known, alive = _gradient(
        grad_output, input, mean, invstd, weight, bias, kept, residual, mask, activation, slope
    )
    sums = numbers(sum_grad), numbers(sum_grad_xhat)
    dx = torch.empty_like(x) if out is None or x is not input else out
    dresidual = (torch.empty_like(x) if known is None else known) if residual else None
    _cpu.grad_input(
        *arguments, sums[0].data_ptr(), sums[1].data_ptr(), count.item(), dx.data_ptr(),
        0 if dresidual is None or dresidual is known else dresidual.data_ptr(),
    )  # fmt: skip
    del alive
    if out is None:
        dx = back(dx, input)
    elif dx is not out:
        dx = out.copy_(dx)
    return dx, input.new_empty(0) if dresidual is None else back(dresidual, input)


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    """Move the running statistics, in place; the caller has counted the batch."""
    buffers = []
    for buffer in (running_mean, running_var):
        plain = buffer.is_contiguous() and buffer.dtype in CODES
        buffers.append(buffer if plain else buffer.to(DOUBLE, memory_format=torch.contiguous_format))
    tracked = None if num_batches_tracked is None else num_batches_tracked.to(torch.int64)
    mean, var = numbers(mean), numbers(var)
    _cpu.update_running(
        buffers[0].data_ptr(), CODES[buffers[0].dtype], buffers[1].data_ptr(), CODES[buffers[1].dtype],
        0 if tracked is None else tracked.data_ptr(), mean.shape[-1], mean.data_ptr(), var.data_ptr(), count.item(),
        nan if momentum is None else momentum, skip_nonfinite,
    )  # fmt: skip
    for buffer, moved in zip((running_mean, running_var), buffers, strict=True):
        if moved is buffer:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(moved)


def unpack(packed: Tensor, input: Tensor) -> Tensor:
    """The bits that `forward` or `normalize` kept for `input`, as booleans of its shape."""
    x, last, n, c, _s = see(input)
    places = torch.arange(8, dtype=torch.uint8)
    on = ((packed.unsqueeze(1) >> places) & 1).reshape(-1)[: x.numel()].bool()
    if last and input.dim() > 2:
        return on.view(n, *input.shape[2:], c).movedim(-1, 1)
    return on.view(input.shape)

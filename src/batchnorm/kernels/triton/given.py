"""The kernels with statistics given (eval mode, frozen layers, the four primitives) and what goes with them."""

import torch
from torch import Tensor

from batchnorm._errors import InputError, message
from batchnorm.kernels.triton.grad_input import grad_input_into
from batchnorm.kernels.triton.grad_sums import Sums, find_sums, operands_of
from batchnorm.kernels.triton.moments import Found, find_moments
from batchnorm.kernels.triton.normalize import normalize_into
from batchnorm.kernels.triton.running import rule_of, update
from batchnorm.kernels.triton.tensors import (
    DOUBLE,
    FLOATS,
    back,
    beside,
    count_of_nothing,
    frequencies,
    numbers,
    on_its_device,
    plain,
    present,
    room_for_bits,
    see,
)

__all__ = ["eval_forward", "grad_input", "grad_sums", "moments", "normalize", "update_running_"]


@on_its_device
def moments(input: Tensor, mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and m2 = Σ(x − mean)², both (G, C), and the count (G, 1)."""
    mean, m2 = (input.new_empty(groups, input.shape[1], dtype=DOUBLE) for _ in range(2))
    count = input.new_empty(groups, 1, dtype=DOUBLE)
    if input.numel() == 0:
        return mean.zero_(), m2.zero_(), count_of_nothing(input, mask, count)
    seen = see(input, groups)
    find_moments(seen, frequencies(mask, seen.wide), Found(mean, m2, None, count), None, None, keep=False)
    return mean, m2, count


@on_its_device
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
) -> tuple[Tensor, Tensor]:
    """Given statistics: (output, saved)."""
    statistics = numbers(mean), numbers(invstd)
    y, bits = _normalize(
        input, mean.shape[0], statistics, None, weight, bias, residual, mask, activation, slope
    )
    return y, present(bits, input)


def _normalize(
    input: Tensor,
    groups: int,
    statistics: tuple[Tensor, Tensor],
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
    written: tuple[Tensor | None, Tensor | None] = (None, None),
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(output, bits) by (mean, 1/σ), or with an eps by (mean, variance)."""
    if input.numel() == 0:
        return torch.empty_like(input), None
    seen = see(input, groups)
    y = out if out is not None and seen.x is input else torch.empty_like(seen.x)
    residual = None if residual is None else beside(residual, seen.x)
    bits = room_for_bits(seen.x, residual, activation)
    normalize_into(
        y, seen, statistics, eps, (plain(weight), plain(bias)), residual, bits, frequencies(mask, seen.wide),
        activation, slope, written=written,
    )  # fmt: skip
    if out is not None:
        return (out if y is out else out.copy_(y)), bits
    return back(y, input), bits


@on_its_device
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
    """Given statistics: Σg and Σg·x̂, both (G, C)."""
    sums = torch.empty_like(mean, dtype=DOUBLE), torch.empty_like(mean, dtype=DOUBLE)
    if input.numel() == 0:
        return sums[0].zero_(), sums[1].zero_()
    seen = see(input, mean.shape[0])
    operands = operands_of(seen, grad_output, weight, bias, kept, residual, mask, activation, slope)
    find_sums(seen, operands, (numbers(mean), numbers(invstd)), None, Sums(*sums), given=True, keep=False)
    return sums


@on_its_device
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
) -> tuple[Tensor, Tensor]:
    """Given statistics and sums: (grad_input, grad_residual)."""
    if input.numel() == 0:
        return torch.empty_like(input), torch.empty_like(input) if residual else input.new_empty(0)
    seen = see(input, mean.shape[0])
    operands = operands_of(seen, grad_output, weight, bias, kept, residual, mask, activation, slope)
    dx = torch.empty_like(seen.x)
    dresidual = torch.empty_like(seen.x) if residual else None
    sums = numbers(sum_grad), numbers(sum_grad_xhat)
    grad_input_into(dx, dresidual, seen, operands, (numbers(mean), numbers(invstd)), sums, numbers(count))
    return back(dx, input), input.new_empty(0) if dresidual is None else back(dresidual, input)


@on_its_device
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
    """Given running statistics: (output, bits, (mean, 1/σ) as (2, C))."""
    statistics = input.new_empty(2, input.shape[1], dtype=DOUBLE)
    if input.numel() == 0:
        statistics[0] = running_mean
        statistics[1] = (running_var.to(DOUBLE) + eps).rsqrt()
        return torch.empty_like(input) if out is None else out, None, statistics
    mean, invstd = statistics.unbind()
    given = running_mean.contiguous(), running_var.contiguous()
    y, bits = _normalize(
        input, 1, given, eps, weight, bias, residual, None, activation, slope, (mean, invstd), out
    )
    return y, bits, statistics


@on_its_device
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
    if mean.shape[0] != 1:
        raise InputError(
            message(
                "update_running_", got=f"{mean.shape[0]} groups", expected="statistics merged into one group"
            )
        )
    tracked = num_batches_tracked
    buffers = []
    for buffer in (running_mean, running_var):
        written = buffer.is_contiguous() and buffer.dtype in FLOATS
        buffers.append(buffer if written else buffer.to(DOUBLE, memory_format=torch.contiguous_format))
    counter = None if tracked is None else tracked.to(torch.int64)
    if running_mean.numel() == 0:
        return
    update(
        rule_of(buffers[0], buffers[1], counter, momentum, skip_nonfinite),
        numbers(mean),
        numbers(var),
        numbers(count),
    )
    for buffer, moved in zip((running_mean, running_var), buffers, strict=True):
        if moved is buffer:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(moved)

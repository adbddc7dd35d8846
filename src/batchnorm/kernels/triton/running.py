"""The running statistics: the rule, which the reduction applies in training, and a launch of its own for tracing."""

from struct import Struct
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.triton.common import narrowed
from batchnorm.kernels.triton.launching import Launch, launched

__all__ = ["Rule", "moved_statistics", "rule_of", "update"]

_BLOCK = 128
_SINGLE = Struct("f")


@triton.jit
def moved_statistics(
    running_mean, running_var, tracked, counted, mean, var, total, momentum_high, momentum_low, channel, C,
    CUMULATIVE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """(6): running ← running·(1 − f) + batch·f in float64, with the unbiased variance; f = 1 / num_batches_tracked
    where momentum is None. `counted` batches are still to be added to that counter.
    """
    inside = channel < C
    factor = (tl.zeros([1], tl.float64) + momentum_high) + momentum_low
    if CUMULATIVE:
        if tracked is not None:
            factor += 1.0 / (tl.load(tracked) + counted).to(tl.float64)
    total = tl.zeros(channel.shape, tl.float64) + total
    unbiased = var * total / tl.where(total > 1, total - 1, 1.0)
    old_mean = tl.load(running_mean + channel, mask=inside, other=0.0)
    old_var = tl.load(running_var + channel, mask=inside, other=0.0)
    new_mean = narrowed(old_mean.to(tl.float64) * (1 - factor) + mean * factor, running_mean.dtype.element_ty)
    new_var = narrowed(
        old_var.to(tl.float64) * (1 - factor) + unbiased * factor, running_var.dtype.element_ty
    )
    moves_mean, moves_var = inside & (total > 0), inside & (total > 1)
    if SKIP:
        finite = _is_finite(mean) & _is_finite(unbiased)
        finite = finite & _is_finite(new_mean.to(tl.float64)) & _is_finite(new_var.to(tl.float64))
        moves_mean, moves_var = moves_mean & finite, moves_var & finite
    tl.store(running_mean + channel, new_mean, mask=moves_mean)
    tl.store(running_var + channel, new_var, mask=moves_var)


@triton.jit
def _is_finite(value):
    return value - value == 0


@triton.jit
def _running_kernel(
    running_mean, running_var, tracked, mean, var, count, momentum_high, momentum_low, C,
    CUMULATIVE: tl.constexpr, SKIP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < C
    moved_statistics(
        running_mean, running_var, tracked, 0,
        tl.load(mean + channel, mask=inside, other=0.0), tl.load(var + channel, mask=inside, other=0.0),
        tl.load(count), momentum_high, momentum_low, channel, C, CUMULATIVE, SKIP,
    )  # fmt: skip


@launched
def _launch(channels: int, cumulative: bool, skip: bool) -> Launch:
    return Launch(_running_kernel, -(-channels // _BLOCK), (channels,), (cumulative, skip, _BLOCK), warps=1)


class Rule(NamedTuple):
    """Buffers that move, (mean, var, counter or None), and how: the momentum as two float32, or 1 / counter."""

    buffers: tuple[Tensor, Tensor, Tensor | None]
    factor: tuple[float, float]
    cumulative: bool
    skip: bool


def rule_of(mean: Tensor, var: Tensor, tracked: Tensor | None, momentum: float | None, skip: bool) -> Rule:
    """The rule as the kernels read it: Triton passes a float as float32, and two of them hold a momentum."""
    if momentum is None:
        return Rule((mean, var, tracked), (0.0, 0.0), True, skip)
    high = _SINGLE.unpack(_SINGLE.pack(momentum))[0]
    return Rule((mean, var, tracked), (high, momentum - high), False, skip)


def update(rule: Rule, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Move the running statistics, in place, after the batch has been counted."""
    launch = _launch(mean.shape[-1], rule.cumulative, rule.skip)
    launch((*rule.buffers, mean, var, count), rule.factor)

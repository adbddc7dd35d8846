"""dx = weight/σ·(g − w·(Σg + x̂·Σg·x̂)/n) of (9), and the gradient of the residual: one pass, one launch.

The mean of the gradient is taken off as two float32, before anything is multiplied, as the mean of x is.
"""

import triton
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.triton.common import accumulator, aligned, by_channel, narrowed, split_in_two
from batchnorm.kernels.triton.grad_sums import Operands
from batchnorm.kernels.triton.gradients import channel_numbers, gated_tile
from batchnorm.kernels.triton.launching import Launch, launched
from batchnorm.kernels.triton.normalize import sweep_at
from batchnorm.kernels.triton.plan import Plan
from batchnorm.kernels.triton.tensors import Seen

__all__ = ["grad_input_into"]


@triton.jit
def _grad_input_kernel(
    dx, residual_grad, dy, x, kept, bits, mask, mean, invstd, weight, bias, sum_g, sum_gxhat, count,
    N, C, S, blocks, runs, programs,
    ACT: tl.constexpr, SLOPE: tl.constexpr, EACH_WEIGHT: tl.constexpr, EACH_BIAS: tl.constexpr,
    ALIGN: tl.constexpr, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one tile."""
    group, sample, first, block = sweep_at(tl.program_id(0), programs, blocks, runs, N, LAST, BP)
    channel = block * BC + tl.arange(0, BC)
    C, S = aligned(C, S, ALIGN, LAST)
    high, low, rstd, scale, shift, _ = channel_numbers(
        x, mean, invstd, weight, bias, group, channel, C, None, EACH_WEIGHT, EACH_BIAS, ACC
    )
    if count is None:
        total = (tl.cast(N, tl.int64) * S).to(tl.float64)
    else:
        total = tl.load(count + group)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    at = tl.cast(group, tl.int64) * C + channel
    mean_g = tl.load(sum_g + at, mask=channel < C, other=0.0) * share
    g_high, g_low = split_in_two(mean_g, ACC)
    mean_gxhat = (tl.load(sum_gxhat + at, mask=channel < C, other=0.0) * share).to(ACC)
    g, xhat, w, valid, start, inner, inside = gated_tile(
        dy, x, kept, bits, mask, sample, first, block, high, low, rstd, scale, shift, C, S,
        ACT, SLOPE, NEAR, LAST, BP, BC, ACC,
    )  # fmt: skip
    if mask is None:
        e = (g - by_channel(g_high, LAST)) - by_channel(g_low, LAST)
        result = (e - xhat * by_channel(mean_gxhat, LAST)) * by_channel(scale * rstd, LAST)
    else:
        e = (g - w * by_channel(g_high, LAST)) - w * by_channel(g_low, LAST)
        result = (e - w * xhat * by_channel(mean_gxhat, LAST)) * by_channel(scale * rstd, LAST)
        result = tl.where(valid, result, 0.0)
    tl.store(dx + start + inner, narrowed(result, dx.dtype.element_ty), mask=inside)
    if residual_grad is not None:
        tl.store(residual_grad + start + inner, narrowed(g, residual_grad.dtype.element_ty), mask=inside)


@launched
def _launch(plan: Plan, activation: str | None, slope: float, each: tuple[bool, bool], wide: bool) -> Launch:
    view, sweep = plan.view, plan.grad_input
    numbers = (view.samples, view.channels, view.positions, sweep.blocks, sweep.runs, sweep.programs)
    constants = (
        activation or "none", slope, *each,
        plan.align, plan.near, view.last, sweep.tile.positions, sweep.tile.channels, accumulator(wide),
    )  # fmt: skip
    return Launch(_grad_input_kernel, sweep.programs, numbers, constants, sweep.tile.warps)


def grad_input_into(
    dx: Tensor,
    residual_grad: Tensor | None,
    seen: Seen,
    operands: Operands,
    statistics: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    count: Tensor | None,
) -> None:
    """Launch the pass: statistics (mean, 1/σ), sums (Σg, Σg·x̂), and the count where it is not that of the elements."""
    dy, kept, bits, mask, weight, bias, activation, slope = operands
    launch = _launch(seen.plan, activation, slope, operands.each, seen.wide)
    launch((dx, residual_grad, dy, seen.x, kept, bits, mask, *statistics, weight, bias, *sums, count))

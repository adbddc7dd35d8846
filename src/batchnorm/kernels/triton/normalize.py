"""y = act((x − mean)·invstd·weight + bias + residual), and the bits that backward needs: one pass, one launch.

x − mean is taken before anything is multiplied, with the mean as two float32, and the tiles run from the end of the
tensor to its beginning: what the reduction before it has read last is still in the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.triton.common import (
    accumulator,
    activated,
    aligned,
    bits_at,
    by_channel,
    by_position,
    center_of,
    inside_of,
    is_on,
    narrowed,
    packed,
    parameter_at,
    tile_at,
    weights_at,
)
from batchnorm.kernels.triton.launching import Launch, launched
from batchnorm.kernels.triton.plan import Plan
from batchnorm.kernels.triton.tensors import Seen

__all__ = ["normalize_into", "sweep_at"]


@triton.jit
def sweep_at(program, programs, blocks, runs, N, LAST: tl.constexpr, BP: tl.constexpr):
    """(group, sample, first position, block of channels) of a program: memory from its end to its beginning."""
    place = programs - 1 - program
    if LAST:
        block = place % blocks
        run = place // blocks % runs
        group = place // blocks // runs
        return group, tl.cast(group, tl.int64), tl.cast(run, tl.int64) * BP, block
    else:
        run = place % runs
        block = place // runs % blocks
        sample = place // runs // blocks
        return sample // N, tl.cast(sample, tl.int64), tl.cast(run, tl.int64) * BP, block


@triton.jit
def _center_and_scale(x, mean, spread, at, inside, EPS: tl.constexpr, ACC: tl.constexpr):
    """(mean as two numbers, 1/σ). `spread` is 1/σ in float64, or with an EPS the variance in any dtype."""
    center = tl.load(mean + at, mask=inside, other=0.0).to(tl.float64)
    high, low = center_of(x, center, ACC)
    if EPS is None:
        invstd = tl.load(spread + at, mask=inside, other=0.0).to(ACC)
    elif ACC == tl.float64:
        invstd = 1.0 / tl.sqrt(tl.load(spread + at, mask=inside, other=1.0).to(ACC) + EPS)
    else:  # rounded as IEEE has it: Triton's division and root of float32 are approximations
        var = tl.load(spread + at, mask=inside, other=1.0).to(ACC)
        invstd = tl.div_rn(tl.full(var.shape, 1.0, ACC), tl.sqrt_rn(var + EPS))
    return high, low, invstd


@triton.jit
def _normalize_kernel(
    x, y, residual, bits, mask, mean, spread, weight, bias, mean_out, invstd_out, tracked,
    N, C, S, blocks, runs, programs,
    EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, EACH_WEIGHT: tl.constexpr, EACH_BIAS: tl.constexpr,
    ALIGN: tl.constexpr, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one tile."""
    program = tl.program_id(0)
    group, sample, first, block = sweep_at(program, programs, blocks, runs, N, LAST, BP)
    channel = block * BC + tl.arange(0, BC)
    C, S = aligned(C, S, ALIGN, LAST)
    start, inner, there = tile_at(sample, first, block, C, S, NEAR, LAST, BP, BC)
    inside = inside_of(there, channel, C, LAST)
    valid = inside
    if mask is not None:
        valid = inside & (by_position(weights_at(mask, sample, first, there, S, BP, ACC), LAST) > 0)
    at = tl.cast(group, tl.int64) * C + channel
    high, low, invstd = _center_and_scale(x, mean, spread, at, channel < C, EPS, ACC)
    scale = parameter_at(weight, group, channel, C, 1.0, EACH_WEIGHT, ACC) * invstd
    shift = parameter_at(bias, group, channel, C, 0.0, EACH_BIAS, ACC)
    value = tl.load(x + start + inner, mask=valid, other=0.0).to(ACC)
    deviation = (value - by_channel(high, LAST)) - by_channel(low, LAST)
    z = deviation * by_channel(scale, LAST) + by_channel(shift, LAST)
    if residual is not None:
        z += tl.load(residual + start + inner, mask=valid, other=0.0).to(ACC)
    if bits is not None:
        byte, bytes_inner, known = bits_at(sample, first, block, C, S, NEAR, LAST, BP, BC)
        on = packed(is_on(z, ACT), BP if LAST else BC, BC if LAST else BP)
        tl.store(bits + byte + bytes_inner, on, mask=known)
    result = activated(z, ACT, SLOPE)
    if mask is not None:
        result = tl.where(valid, result, 0.0)
    tl.store(y + start + inner, narrowed(result, y.dtype.element_ty), mask=inside)
    if tracked is not None:  # here, because all programs of the reduction read it
        if program == 0:
            tl.store(tracked, tl.load(tracked) + 1)
    if mean_out is not None:
        # Of every group the programs of one tile; the statistics that backward is to be given, exact in float64.
        if (sample == tl.cast(group, tl.int64) * N) & (first == 0):
            center = tl.load(mean + at, mask=channel < C, other=0.0).to(tl.float64)
            var = tl.load(spread + at, mask=channel < C, other=1.0).to(tl.float64)
            tl.store(mean_out + at, center, mask=channel < C)
            tl.store(invstd_out + at, 1.0 / tl.sqrt(var + EPS), mask=channel < C)


@launched
def _launch(
    plan: Plan, eps: float | None, activation: str | None, slope: float, each: tuple[bool, bool], wide: bool
) -> Launch:
    view, sweep = plan.view, plan.normalize
    numbers = (view.samples, view.channels, view.positions, sweep.blocks, sweep.runs, sweep.programs)
    constants = (
        eps, activation or "none", slope, *each,
        plan.align, plan.near, view.last, sweep.tile.positions, sweep.tile.channels, accumulator(wide),
    )  # fmt: skip
    return Launch(_normalize_kernel, sweep.programs, numbers, constants, sweep.tile.warps)


def normalize_into(
    y: Tensor,
    seen: Seen,
    statistics: tuple[Tensor, Tensor],
    eps: float | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    bits: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
    tracked: Tensor | None = None,
    written: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Launch the pass: statistics (mean, 1/σ), or with an eps (mean, variance), which are then `written` as the former.

    `tracked` counts one batch.
    """
    weight, bias = parameters
    each = weight is not None and weight.dim() == 2, bias is not None and bias.dim() == 2
    launch = _launch(seen.plan, eps, activation, slope, each, seen.wide)
    launch((seen.x, y, residual, bits, mask, *statistics, weight, bias, *written, tracked))

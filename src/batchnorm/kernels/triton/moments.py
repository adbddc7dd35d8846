"""Mean and variance of every channel, and in training the running statistics: one reading of x, one launch.

A program sums its pieces about a pilot, the mean of its first tile, and leaves (pilot, mean about it, root mean square
about that). The last program of a block of channels merges them by (12), twice through the partial results, in a fixed
order, and about the first pilot, so that all sums are float32 of numbers of the size of σ.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.triton.common import (
    PARTIALS,
    accumulator,
    aligned,
    by_channel,
    by_position,
    inside_of,
    is_last,
    over_positions,
    partials_at,
    piece_at,
    positions_before,
    reaching,
    tile_at,
    weights_at,
)
from batchnorm.kernels.triton.launching import Launch, launched, scratch_for
from batchnorm.kernels.triton.plan import Plan, registers
from batchnorm.kernels.triton.running import Rule, moved_statistics
from batchnorm.kernels.triton.tensors import Seen

__all__ = ["Found", "find_moments"]

# Deviations above 10¹⁹ have no square in float32; scaled by 2⁻⁹⁶ they have, and such channels are summed again.
SCALE, LARGEST = tl.constexpr(2.0**-96), tl.constexpr(3.0e38)
# Partial results that are merged at a time. Measured: 64 cost nothing, one by one more than a launch; 32
# take no more registers than the sums before them do.
MERGED = tl.constexpr(32)


@triton.jit
def _summed(
    x, group, first, last, block, N, C, S,
    NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(pilot, mean and mean square about it, count) of some pieces."""
    channel = block * BC + tl.arange(0, BC)
    sample, begin = piece_at(first, group, N, S, LAST, BP)
    start, inner, there = tile_at(sample, begin, block, C, S, NEAR, LAST, BP, BC)
    inside = inside_of(there, channel, C, LAST)
    # About the first element: a constant channel then has exactly its value for a pilot, and deviations of exactly 0.
    step = tl.arange(0, BC) if LAST else reaching(tl.arange(0, BC), NEAR) * S
    one = tl.load(x + start + step, mask=channel < C, other=0.0).to(ACC)
    value = tl.load(x + start + inner, mask=inside, other=0.0).to(ACC)
    apart = over_positions(tl.where(inside, value - by_channel(one, LAST), 0.0), LAST)
    pilot = one + apart / tl.minimum(S - begin, BP).to(ACC)
    shape: tl.constexpr = [BP, BC] if LAST else [BC, BP]
    s, q = tl.zeros(shape, ACC), tl.zeros(shape, ACC)
    for piece in range(first, last):
        sample, begin = piece_at(piece, group, N, S, LAST, BP)
        start, inner, there = tile_at(sample, begin, block, C, S, NEAR, LAST, BP, BC)
        inside = inside_of(there, channel, C, LAST)
        value = tl.load(x + start + inner, mask=inside, other=0.0).to(ACC)
        deviation = tl.where(inside, value - by_channel(pilot, LAST), 0.0)
        s += deviation
        q += deviation * deviation
    count = (positions_before(last, S, LAST, BP) - positions_before(first, S, LAST, BP)).to(ACC)
    return pilot, over_positions(s, LAST) / count, over_positions(q, LAST) / count, count


@triton.jit
def _merged_tiles(
    x, mask, group, first, last, block, scale, N, C, S,
    NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`_summed` with frequencies, and for any size: deviations times `scale`. A tile may have any weight, or none, so
    every tile has a pilot of its own, and they are merged one by one, as in (12).
    """
    channel = block * BC + tl.arange(0, BC)
    shift, mean, square = tl.zeros([BC], ACC), tl.zeros([BC], ACC), tl.zeros([BC], ACC)
    count = tl.sum(tl.zeros([BP], ACC), 0)
    for piece in range(first, last):
        sample, begin = piece_at(piece, group, N, S, LAST, BP)
        start, inner, there = tile_at(sample, begin, block, C, S, NEAR, LAST, BP, BC)
        weight = there.to(ACC)
        if mask is not None:
            weight = weights_at(mask, sample, begin, there, S, BP, ACC)
        w = by_position(weight, LAST)
        valid = inside_of(there, channel, C, LAST) & (w > 0)
        value = tl.load(x + start + inner, mask=valid, other=0.0).to(ACC)
        n = tl.sum(weight, 0)
        share = 1.0 / tl.where(n > 0, n, 1.0)
        one = tl.max(tl.where(valid, value, -float("inf")), 0 if LAST else 1)
        one = tl.where(one > -float("inf"), one, 0.0)
        pilot = one + over_positions(tl.where(valid, w * share * (value - by_channel(one, LAST)), 0.0), LAST)
        deviation = tl.where(valid, (value - by_channel(pilot, LAST)) * by_channel(scale, LAST), 0.0)
        s = over_positions(w * deviation, LAST) * share
        q = over_positions(w * deviation * deviation, LAST) * share - s * s
        shift = tl.where(count > 0, shift, pilot)
        total = count + n
        part = n / tl.where(total > 0, total, 1.0)
        apart = (pilot - shift) * scale + s - mean
        square += (q - square) * part + apart * apart * (part * (1.0 - part))
        mean += apart * part
        count = total
    return shift, mean, square + mean * mean, count


@triton.jit
def _too_large(square, channel, C):
    """Which channels have no float32 for their sums, or a NaN."""
    return ((square < LARGEST) == 0) & (channel < C)


@triton.jit
def _weight_of(
    partials, group, split, channel, S, pieces, per, C, splits, groups,
    WEIGHTED: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weights of some splits, (splits, channels)."""
    there = (split < splits)[:, None] & (channel < C)[None, :]
    if WEIGHTED:
        at = partials_at(partials, 3, group, split[:, None], channel[None, :], C, splits, groups)
        return tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    else:
        begin = positions_before(tl.minimum(split * per, pieces), S, LAST, BP)
        end = positions_before(tl.minimum(split * per + per, pieces), S, LAST, BP)
        return tl.where(there, (end - begin).to(ACC)[:, None], 0.0)


@triton.jit
def _shift_of(
    partials, group, channel, C, splits, groups,
    WEIGHTED: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A number near the values of each channel: the pilot of the first split, or of one that has weight."""
    inside = channel < C
    if WEIGHTED:
        found = tl.full([BC], -float("inf"), ACC)
        for start in range(0, splits, MERGED):
            split = start + tl.arange(0, MERGED)
            there = (split < splits)[:, None] & inside[None, :]
            at = partials_at(partials, 0, group, split[:, None], channel[None, :], C, splits, groups)
            weight_at = partials_at(partials, 3, group, split[:, None], channel[None, :], C, splits, groups)
            weight = tl.load(weight_at, mask=there, other=0.0, cache_modifier=".cg")
            shift = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            found = tl.maximum(found, tl.max(tl.where(weight > 0, shift, -float("inf")), 0))
        return tl.where(found > -float("inf"), found, 0.0)
    else:
        at = partials_at(partials, 0, group, 0, channel, C, splits, groups)
        return tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def _merged(
    partials, group, channel, shift, scale, total, S, pieces, per, C, splits, groups,
    WEIGHTED: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(mean − shift, mean square about the mean) of all splits, the former times `scale`, the latter its square."""
    inside = channel < C
    s = tl.zeros([MERGED, BC], ACC)
    for start in range(0, splits, MERGED):
        split = start + tl.arange(0, MERGED)
        there = (split < splits)[:, None] & inside[None, :]
        n = _weight_of(
            partials, group, split, channel, S, pieces, per, C, splits, groups, WEIGHTED, LAST, BP, BC, ACC
        )
        at = partials_at(partials, 0, group, split[:, None], channel[None, :], C, splits, groups)
        pilot = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        at = partials_at(partials, 1, group, split[:, None], channel[None, :], C, splits, groups)
        about = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        s += tl.where(n > 0, n * (((pilot - shift[None, :]) + about) * scale[None, :]), 0.0)
    mean = tl.sum(s, 0) / total
    q = tl.zeros([MERGED, BC], ACC)
    for start in range(0, splits, MERGED):
        split = start + tl.arange(0, MERGED)
        there = (split < splits)[:, None] & inside[None, :]
        n = _weight_of(
            partials, group, split, channel, S, pieces, per, C, splits, groups, WEIGHTED, LAST, BP, BC, ACC
        )
        at = partials_at(partials, 0, group, split[:, None], channel[None, :], C, splits, groups)
        pilot = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        at = partials_at(partials, 1, group, split[:, None], channel[None, :], C, splits, groups)
        about = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        at = partials_at(partials, 2, group, split[:, None], channel[None, :], C, splits, groups)
        root = tl.load(at, mask=there, other=0.0, cache_modifier=".cg") * scale[None, :]
        apart = ((pilot - shift[None, :]) + about) * scale[None, :] - mean[None, :]
        q += tl.where(n > 0, n * (root * root + apart * apart), 0.0)
    return mean, tl.sum(q, 0) / total


@triton.jit
def _stored(
    mean, var, total, group, channel, block, mean_out, second_out, invstd_out, count_out,
    running_mean, running_var, tracked, momentum_high, momentum_low, C,
    EPS: tl.constexpr, CUMULATIVE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Write what was found, in float64, and move the running statistics."""
    inside = channel < C
    at = tl.cast(group, tl.int64) * C + channel
    tl.store(mean_out + at, mean, mask=inside)
    if EPS is None:
        tl.store(second_out + at, var * total, mask=inside)
    else:
        tl.store(second_out + at, var, mask=inside)
        tl.store(invstd_out + at, 1.0 / tl.sqrt(var + EPS), mask=inside)
    if count_out is not None:
        if block == 0:
            tl.store(count_out + group, total)
    if running_mean is not None:
        moved_statistics(
            running_mean, running_var, tracked, 1, mean, var, total, momentum_high, momentum_low, channel, C,
            CUMULATIVE, SKIP,
        )  # fmt: skip


@triton.jit
def _moments_kernel(
    x, mask, partials, counters, mean_out, second_out, invstd_out, count_out, running_mean, running_var, tracked,
    momentum_high, momentum_low, groups, N, C, S, blocks, pieces, per, splits,
    EPS: tl.constexpr, CUMULATIVE: tl.constexpr, SKIP: tl.constexpr, ALONE: tl.constexpr,
    ALIGN: tl.constexpr, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: `per` pieces of a block of channels of a group; the last of them also merges."""
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks % splits
    group = program // blocks // splits
    channel = block * BC + tl.arange(0, BC)
    C, S = aligned(C, S, ALIGN, LAST)
    inside = channel < C
    first = split * per
    last = tl.minimum(first + per, pieces)
    scale = tl.full([BC], 1.0, ACC)
    if mask is None:
        shift, mean, square, count = _summed(x, group, first, last, block, N, C, S, NEAR, LAST, BP, BC, ACC)
    else:
        shift, mean, square, count = _merged_tiles(
            x, mask, group, first, last, block, scale, N, C, S, NEAR, LAST, BP, BC, ACC
        )
    too_large = _too_large(square, channel, C)
    if tl.max(too_large.to(tl.int32), 0) > 0:
        # The other channels keep what they have, to the bit.
        scale = tl.where(too_large, SCALE, scale)
        again_shift, again_mean, again_square, count = _merged_tiles(
            x, mask, group, first, last, block, scale, N, C, S, NEAR, LAST, BP, BC, ACC
        )
        shift = tl.where(too_large, again_shift, shift)
        mean = tl.where(too_large, again_mean, mean)
        square = tl.where(too_large, again_square, square)
    var = square - mean * mean
    var = tl.where(var < 0, 0.0, var)
    if ALONE:
        wide = scale.to(tl.float64)
        mean64 = shift.to(tl.float64) + mean.to(tl.float64) / wide
        var64 = var.to(tl.float64) / wide / wide
        _stored(
            mean64, var64, count.to(tl.float64), group, channel, block, mean_out, second_out, invstd_out, count_out,
            running_mean, running_var, tracked, momentum_high, momentum_low, C, EPS, CUMULATIVE, SKIP,
        )  # fmt: skip
    else:
        WEIGHTED: tl.constexpr = mask is not None
        # The root, because the square of a large deviation is no float32.
        root = tl.sqrt(var) / scale
        tl.store(partials_at(partials, 0, group, split, channel, C, splits, groups), shift, mask=inside)
        tl.store(
            partials_at(partials, 1, group, split, channel, C, splits, groups), mean / scale, mask=inside
        )
        tl.store(partials_at(partials, 2, group, split, channel, C, splits, groups), root, mask=inside)
        if WEIGHTED:
            at = partials_at(partials, 3, group, split, channel, C, splits, groups)
            tl.store(at, tl.zeros([BC], ACC) + count, mask=inside)
        if is_last(counters + group * blocks + block, splits):
            if WEIGHTED:
                total = count.to(tl.float64) * 0
                for start in range(0, splits, MERGED):
                    every = start + tl.arange(0, MERGED)
                    rows = partials_at(partials, 3, group, every, block * BC, C, splits, groups)
                    n = tl.load(rows, mask=every < splits, other=0.0, cache_modifier=".cg")
                    total += tl.sum(n.to(tl.float64), 0)
            else:
                total = positions_before(pieces, S, LAST, BP).to(tl.float64)
            divisor = tl.where(total > 0, total, 1.0).to(ACC)
            shift = _shift_of(partials, group, channel, C, splits, groups, WEIGHTED, BC, ACC)
            scale = tl.full([BC], 1.0, ACC)
            mean, var = _merged(
                partials, group, channel, shift, scale, divisor, S, pieces, per, C, splits, groups,
                WEIGHTED, LAST, BP, BC, ACC,
            )  # fmt: skip
            too_large = _too_large(var, channel, C)
            if tl.max(too_large.to(tl.int32), 0) > 0:
                scale = tl.where(too_large, SCALE, scale)
                mean, var = _merged(
                    partials, group, channel, shift, scale, divisor, S, pieces, per, C, splits, groups,
                    WEIGHTED, LAST, BP, BC, ACC,
                )  # fmt: skip
            wide = scale.to(tl.float64)
            mean64 = shift.to(tl.float64) + mean.to(tl.float64) / wide
            var64 = var.to(tl.float64) / wide / wide
            _stored(
                mean64, var64, total, group, channel, block, mean_out, second_out, invstd_out, count_out,
                running_mean, running_var, tracked, momentum_high, momentum_low, C, EPS, CUMULATIVE, SKIP,
            )  # fmt: skip


@launched
def _launch(plan: Plan, eps: float | None, cumulative: bool, skip: bool, wide: bool) -> Launch:
    view, reduction = plan.view, plan.moments
    numbers = (
        view.groups, view.samples, view.channels, view.positions,
        reduction.blocks, reduction.pieces, reduction.per, reduction.splits,
    )  # fmt: skip
    constants = (
        eps, cumulative, skip, reduction.splits == 1,
        plan.align, plan.near, view.last, reduction.tile.positions, reduction.tile.channels, accumulator(wide),
    )  # fmt: skip
    return Launch(
        _moments_kernel, reduction.programs, numbers, constants, reduction.tile.warps, registers(wide)
    )


class Found(NamedTuple):
    """Where the results go, all float64: mean, and m2, or with an eps the variance and the inverse deviation."""

    mean: Tensor
    second: Tensor
    invstd: Tensor | None = None
    total: Tensor | None = None


def find_moments(
    seen: Seen, mask: Tensor | None, found: Found, eps: float | None, running: Rule | None, keep: bool
) -> None:
    """Launch the reduction over x; `running` moves with it, but for its counter."""
    view, reduction = seen.plan.view, seen.plan.moments
    splits, blocks = reduction.splits, reduction.blocks
    rows = view.groups * splits if splits > 1 else 0
    scratch = scratch_for(
        seen.x, PARTIALS.value * rows * view.channels, view.groups * blocks, seen.wide, keep
    )
    buffers: tuple[Tensor | None, ...] = (None, None, None)
    cumulative, skip, factor = False, False, (0.0, 0.0)
    if running is not None:
        buffers, factor = running.buffers, running.factor
        cumulative, skip = running.cumulative, running.skip
    launch = _launch(seen.plan, eps, cumulative, skip, seen.wide)
    launch((seen.x, mask, *scratch, *found, *buffers), factor)

"""Σg and Σg·x̂ of (8), with g = dy·act′: one reading of dy and x, one launch.

Sums are taken of g − g₀ with g₀ a number near the gradients of the channel's first tile, the same for all programs:
an offset of the gradient would else be multiplied by the rounding of Σx̂, which is 0 where x̂ has the statistics of the
batch. Where the statistics are GIVEN it is not, and Σx̂ is summed, too. The last program of a block of channels adds up
the partial results in a fixed order.
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
    is_last,
    narrowed,
    over_positions,
    partials_at,
    piece_at,
    positions_before,
)
from batchnorm.kernels.triton.gradients import channel_numbers, gated_tile
from batchnorm.kernels.triton.launching import Launch, launched, scratch_for
from batchnorm.kernels.triton.plan import Plan, registers
from batchnorm.kernels.triton.tensors import WITH_BITS, Seen, beside, frequencies, plain

__all__ = ["Operands", "Sums", "find_sums", "operands_of"]

MERGED = tl.constexpr(32)  # as in moments


@triton.jit
def _near(
    dy, x, kept, bits, mask, group, block, high, low, invstd, scale, shift, N, C, S,
    ACT: tl.constexpr, SLOPE: tl.constexpr, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """g₀: a number near the gradients of each channel's first tile; exactly their value where they are all one."""
    sample, start = piece_at(0, group, N, S, LAST, BP)
    g, _, _, valid, _, _, _ = gated_tile(
        dy, x, kept, bits, mask, sample, start, block, high, low, invstd, scale, shift, C, S,
        ACT, SLOPE, NEAR, LAST, BP, BC, ACC,
    )  # fmt: skip
    one = tl.max(tl.where(valid, g, -float("inf")), 0 if LAST else 1)
    one = tl.where(one > -float("inf"), one, 0.0)
    total = over_positions(valid.to(ACC), LAST)
    apart = over_positions(tl.where(valid, g - by_channel(one, LAST), 0.0), LAST)
    return one + apart / tl.where(total > 0, total, 1.0)


@triton.jit
def _total(
    partials, kind: tl.constexpr, group, channel, C, splits, groups, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sum of a partial result over all splits."""
    s = tl.zeros([MERGED, BC], ACC)
    for start in range(0, splits, MERGED):
        split = start + tl.arange(0, MERGED)
        at = partials_at(partials, kind, group, split[:, None], channel[None, :], C, splits, groups)
        s += tl.load(
            at, mask=(split < splits)[:, None] & (channel < C)[None, :], other=0.0, cache_modifier=".cg"
        )
    return tl.sum(s, 0).to(tl.float64)


@triton.jit
def _stored(
    sum_e, sum_exhat, sum_xhat, total, near, exact, group, channel,
    sum_g_out, sum_gxhat_out, invstd_out, weight_grad, bias_grad, C,
    EPS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    inside = channel < C
    at = tl.cast(group, tl.int64) * C + channel
    sum_g = sum_e + total * near.to(tl.float64)
    sum_gxhat = sum_exhat
    if GIVEN:
        sum_gxhat += near.to(tl.float64) * sum_xhat
    tl.store(sum_g_out + at, sum_g, mask=inside)
    tl.store(sum_gxhat_out + at, sum_gxhat, mask=inside)
    if EPS is not None:
        tl.store(invstd_out + at, exact, mask=inside)
    if weight_grad is not None:
        tl.store(weight_grad + at, narrowed(sum_gxhat, weight_grad.dtype.element_ty), mask=inside)
    if bias_grad is not None:
        tl.store(bias_grad + at, narrowed(sum_g, bias_grad.dtype.element_ty), mask=inside)


@triton.jit
def _grad_sums_kernel(
    dy, x, kept, bits, mask, mean, spread, weight, bias, partials, counters,
    sum_g_out, sum_gxhat_out, invstd_out, weight_grad, bias_grad,
    groups, N, C, S, blocks, pieces, per, splits,
    EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, EACH_WEIGHT: tl.constexpr, EACH_BIAS: tl.constexpr,
    GIVEN: tl.constexpr, ALONE: tl.constexpr,
    ALIGN: tl.constexpr, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: `per` pieces of a block of channels of a group; the last of them also adds up."""
    program = tl.program_id(0)
    block = program % blocks
    split = program // blocks % splits
    group = program // blocks // splits
    channel = block * BC + tl.arange(0, BC)
    C, S = aligned(C, S, ALIGN, LAST)
    high, low, invstd, scale, shift, exact = channel_numbers(
        x, mean, spread, weight, bias, group, channel, C, EPS, EACH_WEIGHT, EACH_BIAS, ACC
    )
    near = _near(
        dy, x, kept, bits, mask, group, block, high, low, invstd, scale, shift, N, C, S,
        ACT, SLOPE, NEAR, LAST, BP, BC, ACC,
    )  # fmt: skip
    first = split * per
    last = tl.minimum(first + per, pieces)
    shape: tl.constexpr = [BP, BC] if LAST else [BC, BP]
    s, q = tl.zeros(shape, ACC), tl.zeros(shape, ACC)
    # Sums that only some calls ask for; elsewhere they are constants that nothing reads.
    h = tl.zeros(shape, ACC)
    n = tl.zeros([BP], ACC)
    for piece in range(first, last):
        sample, start = piece_at(piece, group, N, S, LAST, BP)
        g, xhat, w, valid, _, _, _ = gated_tile(
            dy, x, kept, bits, mask, sample, start, block, high, low, invstd, scale, shift, C, S,
            ACT, SLOPE, NEAR, LAST, BP, BC, ACC,
        )  # fmt: skip
        e = tl.where(valid, g - w * by_channel(near, LAST), 0.0)
        s += e
        q += e * xhat
        if GIVEN:
            h += w * xhat
        if mask is not None:
            n += tl.reshape(w, [BP])
    sum_e, sum_exhat, sum_xhat = over_positions(s, LAST), over_positions(q, LAST), over_positions(h, LAST)
    count = tl.sum(n, 0)
    inside = channel < C
    if ALONE:
        total = count.to(tl.float64)
        if mask is None:
            total = positions_before(pieces, S, LAST, BP).to(tl.float64)
        _stored(
            sum_e.to(tl.float64), sum_exhat.to(tl.float64), sum_xhat.to(tl.float64), total, near, exact, group,
            channel, sum_g_out, sum_gxhat_out, invstd_out, weight_grad, bias_grad, C, EPS, GIVEN,
        )  # fmt: skip
    else:
        tl.store(partials_at(partials, 0, group, split, channel, C, splits, groups), sum_e, mask=inside)
        tl.store(partials_at(partials, 1, group, split, channel, C, splits, groups), sum_exhat, mask=inside)
        if GIVEN:
            tl.store(
                partials_at(partials, 2, group, split, channel, C, splits, groups), sum_xhat, mask=inside
            )
        if mask is not None:
            at = partials_at(partials, 3, group, split, channel, C, splits, groups)
            tl.store(at, tl.zeros([BC], ACC) + count, mask=inside)
        if is_last(counters + group * blocks + block, splits):
            all_e = _total(partials, 0, group, channel, C, splits, groups, BC, ACC)
            all_exhat = _total(partials, 1, group, channel, C, splits, groups, BC, ACC)
            all_xhat = all_e * 0
            if GIVEN:
                all_xhat = _total(partials, 2, group, channel, C, splits, groups, BC, ACC)
            total = all_e * 0 + positions_before(pieces, S, LAST, BP).to(tl.float64)
            if mask is not None:
                total = _total(partials, 3, group, channel, C, splits, groups, BC, ACC)
            _stored(
                all_e, all_exhat, all_xhat, total, near, exact, group, channel,
                sum_g_out, sum_gxhat_out, invstd_out, weight_grad, bias_grad, C, EPS, GIVEN,
            )  # fmt: skip


@launched
def _launch(
    plan: Plan,
    eps: float | None,
    activation: str | None,
    slope: float,
    each: tuple[bool, bool],
    given: bool,
    wide: bool,
) -> Launch:
    view, reduction = plan.view, plan.grad_sums
    numbers = (
        view.groups, view.samples, view.channels, view.positions,
        reduction.blocks, reduction.pieces, reduction.per, reduction.splits,
    )  # fmt: skip
    constants = (
        eps, activation or "none", slope, *each, given, reduction.splits == 1,
        plan.align, plan.near, view.last, reduction.tile.positions, reduction.tile.channels, accumulator(wide),
    )  # fmt: skip
    return Launch(
        _grad_sums_kernel, reduction.programs, numbers, constants, reduction.tile.warps, registers(wide)
    )


class Operands(NamedTuple):
    """What backward reads beside x, all in the memory order of x: `kept` is a residual, `bits` are those of act′."""

    dy: Tensor
    kept: Tensor | None
    bits: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    activation: str | None
    slope: float

    @property
    def each(self) -> tuple[bool, bool]:
        """Whether every group has a weight, and a bias, of its own."""
        weight, bias = self.weight, self.bias
        return weight is not None and weight.dim() == 2, bias is not None and bias.dim() == 2


class Sums(NamedTuple):
    """Where the results go: Σg and Σg·x̂, with an eps 1/σ, and the gradients of weight and bias in their dtype."""

    sum_grad: Tensor
    sum_grad_xhat: Tensor
    invstd: Tensor | None = None
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None


def operands_of(
    seen: Seen,
    grad_output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    residual: bool,
    mask: Tensor | None,
    activation: str | None,
    slope: float,
) -> Operands:
    """What backward reads: `kept` is nothing, the bits of act′, or the residual."""
    with_bits = residual and activation in WITH_BITS
    added = None
    if residual and activation is not None and not with_bits and kept is not None:
        added = beside(kept, seen.x)
    return Operands(
        beside(grad_output, seen.x), added, kept if with_bits else None, frequencies(mask, seen.wide),
        plain(weight), plain(bias), activation, slope,
    )  # fmt: skip


def find_sums(
    seen: Seen,
    operands: Operands,
    statistics: tuple[Tensor, Tensor],
    eps: float | None,
    sums: Sums,
    given: bool,
    keep: bool,
) -> None:
    """Launch the reduction: statistics (mean, 1/σ), or with an eps (mean, variance); `given`: not the batch's."""
    view, reduction = seen.plan.view, seen.plan.grad_sums
    splits, blocks = reduction.splits, reduction.blocks
    rows = view.groups * splits if splits > 1 else 0
    scratch = scratch_for(
        seen.x, PARTIALS.value * rows * view.channels, view.groups * blocks, seen.wide, keep
    )
    dy, kept, bits, mask, weight, bias, activation, slope = operands
    launch = _launch(seen.plan, eps, activation, slope, operands.each, given, seen.wide)
    launch((dy, seen.x, kept, bits, mask, *statistics, weight, bias, *scratch, *sums))

"""What the two kernels of backward share: x̂ and the gated gradient of a tile."""

import triton
import triton.language as tl

from batchnorm.kernels.triton.common import (
    bits_at,
    by_channel,
    by_position,
    center_of,
    gated,
    gated_by,
    inside_of,
    parameter_at,
    tile_at,
    unpacked,
    weights_at,
)

__all__ = ["channel_numbers", "gated_tile"]


@triton.jit
def channel_numbers(
    x, mean, spread, weight, bias, group, channel, C,
    EPS: tl.constexpr, EACH_WEIGHT: tl.constexpr, EACH_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(mean as two numbers, 1/σ, weight, bias, and 1/σ in float64). `spread` is 1/σ, or with an EPS the variance."""
    inside = channel < C
    at = tl.cast(group, tl.int64) * C + channel
    high, low = center_of(x, tl.load(mean + at, mask=inside, other=0.0), ACC)
    exact = tl.load(spread + at, mask=inside, other=1.0)
    if EPS is not None:
        exact = 1.0 / tl.sqrt(exact + EPS)
    scale = parameter_at(weight, group, channel, C, 1.0, EACH_WEIGHT, ACC)
    shift = parameter_at(bias, group, channel, C, 0.0, EACH_BIAS, ACC)
    return high, low, exact.to(ACC), scale, shift, exact


@triton.jit
def gated_tile(
    dy, x, kept, bits, mask, sample, first, block, high, low, invstd, scale, shift, C, S,
    ACT: tl.constexpr, SLOPE: tl.constexpr, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(g = dy·act′, x̂, the weights of the positions, which elements count, where they lie (2), which exist)."""
    channel = block * BC + tl.arange(0, BC)
    start, inner, there = tile_at(sample, first, block, C, S, NEAR, LAST, BP, BC)
    inside = inside_of(there, channel, C, LAST)
    valid = inside
    w = by_position(tl.full([BP], 1.0, ACC), LAST)
    if mask is not None:
        w = by_position(weights_at(mask, sample, first, there, S, BP, ACC), LAST)
        valid = inside & (w > 0)
    g = tl.load(dy + start + inner, mask=valid, other=0.0).to(ACC)
    value = tl.load(x + start + inner, mask=valid, other=0.0).to(ACC)
    deviation = (value - by_channel(high, LAST)) - by_channel(low, LAST)
    deviation = tl.where(valid, deviation, 0.0)
    if bits is not None:
        byte, bytes_inner, known = bits_at(sample, first, block, C, S, NEAR, LAST, BP, BC)
        eights = tl.load(bits + byte + bytes_inner, mask=known, other=0)
        g = gated_by(g, unpacked(eights, BP if LAST else BC, BC if LAST else BP), ACT, SLOPE)
    elif ACT != "none":
        z = deviation * by_channel(scale * invstd, LAST) + by_channel(shift, LAST)
        if kept is not None:
            z += tl.load(kept + start + inner, mask=valid, other=0.0).to(ACC)
        g = tl.where(valid, gated(g, z, ACT, SLOPE), 0.0)
    return g, deviation * by_channel(invstd, LAST), w, valid, start, inner, inside

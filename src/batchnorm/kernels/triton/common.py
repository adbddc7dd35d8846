"""What the kernels share: where a tile lies, activations and their gradients, bits, partial results.

A tile has the shape (positions, channels) where the channel is the fastest axis (LAST), else (channels, positions).
Loads are masked by `inside` and converted to ACC, the dtype of the arithmetic: float32, or float64 for float64 input.
"""

from typing import Any

import triton
import triton.language as tl

# Partial results of a reduction: shift, mean about it, root mean square about that, weight; or the sums of a gradient.
PARTIALS = tl.constexpr(4)


def accumulator(wide: bool) -> Any:
    """ACC."""
    return tl.float64 if wide else tl.float32


@triton.jit
def aligned(C, S, ALIGN: tl.constexpr, LAST: tl.constexpr):
    """(C, S), and the compiler knows that ALIGN divides the one along which memory runs: loads are as wide as that."""
    if LAST:
        return C // ALIGN * ALIGN, S
    else:
        return C, S // ALIGN * ALIGN


@triton.jit
def by_channel(values, LAST: tl.constexpr):
    """A vector of channels, to be broadcast over a tile."""
    return values[None, :] if LAST else values[:, None]


@triton.jit
def by_position(values, LAST: tl.constexpr):
    """A vector of positions, to be broadcast over a tile."""
    return values[:, None] if LAST else values[None, :]


@triton.jit
def over_positions(tile, LAST: tl.constexpr):
    """The sum over the positions of a tile: one number a channel."""
    return tl.sum(tile, 0 if LAST else 1)


@triton.jit
def piece_at(piece, group, N, S, LAST: tl.constexpr, BP: tl.constexpr):
    """(the sample, counted over all groups, and the first position) of a group's piece, both 64 bits wide."""
    if LAST:  # a group is one sample
        return tl.cast(group, tl.int64), tl.cast(piece, tl.int64) * BP
    else:
        runs = tl.cdiv(S, BP)
        sample = tl.cast(group, tl.int64) * N + piece // runs
        return sample, tl.cast(piece % runs, tl.int64) * BP


@triton.jit
def positions_before(piece, S, LAST: tl.constexpr, BP: tl.constexpr):
    """The number of positions in the pieces of a group before this one."""
    runs = tl.cdiv(S, BP)
    wide = tl.cast(piece, tl.int64)
    return wide // runs * S + tl.minimum(wide % runs * BP, S)


@triton.jit
def reaching(offset, NEAR: tl.constexpr):
    """Offsets inside a tile: 32 bits where they suffice, which halves the registers that addresses take."""
    return offset if NEAR else offset.to(tl.int64)


@triton.jit
def tile_at(
    sample, first, block, C, S, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(offset of a tile's first element, offsets of its elements from there, which of its positions exist)."""
    position, channel = tl.arange(0, BP), tl.arange(0, BC)
    there = position < tl.minimum(S - first, BP).to(tl.int32)
    if LAST:
        start = (sample * S + first) * C + block * BC
        inner = reaching(position, NEAR)[:, None] * C + channel[None, :]
    else:
        start = (sample * C + block * BC) * S + first
        inner = reaching(channel, NEAR)[:, None] * S + position[None, :]
    return start, inner, there


@triton.jit
def inside_of(there, channel, C, LAST: tl.constexpr):
    """Which elements of a tile exist."""
    return by_position(there, LAST) & by_channel(channel < C, LAST)


@triton.jit
def weights_at(mask, sample, first, there, S, BP: tl.constexpr, ACC: tl.constexpr):
    """The frequencies (N, *S) of a tile's positions."""
    return tl.load(mask + (sample * S + first) + tl.arange(0, BP), mask=there, other=0).to(ACC)


@triton.jit
def split_in_two(value, ACC: tl.constexpr):
    """A float64 number as two of ACC: float32 alone would round a mean of 10⁷ σ by half a σ."""
    high = value.to(ACC)
    return high, (value - high.to(tl.float64)).to(ACC)


@triton.jit
def narrowed(value, DTYPE: tl.constexpr):
    """The value in the dtype in which it is stored, by way of float32 as PyTorch goes."""
    if DTYPE == tl.float64:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32).to(DTYPE)


@triton.jit
def center_of(x, mean, ACC: tl.constexpr):
    """The mean of x as two numbers; the second is 0 for half types, whose values are 2⁻¹² or more of the mean apart."""
    high, low = split_in_two(mean, ACC)
    if x.dtype.element_ty.primitive_bitwidth == 16:
        low = tl.zeros(high.shape, ACC)
    return high, low


@triton.jit
def parameter_at(parameter, group, channel, C, other: tl.constexpr, EACH: tl.constexpr, ACC: tl.constexpr):
    """The weight or bias of a block of channels; EACH says that every group has its own."""
    if parameter is None:
        return tl.full(channel.shape, other, ACC)
    elif EACH:
        at = tl.cast(group, tl.int64) * C + channel
        return tl.load(parameter + at, mask=channel < C, other=other).to(ACC)
    else:
        return tl.load(parameter + channel, mask=channel < C, other=other).to(ACC)


@triton.jit
def activated(z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act(z). A NaN passes through all of them."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACT == "relu6":
        return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACT == "leaky_relu":
        return tl.where(z > 0, z, z * SLOPE)
    elif ACT == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACT == "hardswish":
        return z * tl.where(z <= -3, 0.0, tl.where(z >= 3, 6.0, z + 3)) / 6
    elif ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        return z


@triton.jit
def is_on(z, ACT: tl.constexpr):
    """Where act′ is 1, for the activations whose act′ takes two values."""
    if ACT == "relu":
        return (z <= 0) == 0
    elif ACT == "relu6":
        return ((z <= 0) | (z >= 6)) == 0
    else:
        return z > 0


@triton.jit
def gated_by(g, on, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """g·act′ where act′ takes two values."""
    if ACT == "leaky_relu":
        return tl.where(on, g, g * SLOPE)
    else:
        return tl.where(on, g, 0.0)


@triton.jit
def gated(g, z, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """g·act′(z), with PyTorch's choice at the kinks."""
    if ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        return g * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    elif ACT == "hardswish":
        return tl.where(z <= -3, 0.0, tl.where(z < 3, g * (z / 3 + 0.5), g))
    elif ACT == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return g * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACT == "none":
        return g
    else:
        return gated_by(g, is_on(z, ACT), ACT, SLOPE)


@triton.jit
def bits_at(
    sample, first, block, C, S, NEAR: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(offset of a tile's first byte, offsets of its bytes from there, which exist): rows and planes begin anew."""
    if LAST:
        row, column = tl.arange(0, BP), tl.arange(0, BC // 8)
        pitch = tl.cdiv(C, 8)
        start = (sample * S + first) * pitch + block * (BC // 8)
        rows, columns = tl.minimum(S - first, BP).to(tl.int32), pitch - block * (BC // 8)
    else:
        row, column = tl.arange(0, BC), tl.arange(0, BP // 8)
        pitch = tl.cdiv(S, 8)
        start = (sample * C + block * BC) * pitch + first // 8
        rows, columns = C - block * BC, (tl.cdiv(tl.minimum(S - first, BP), 8)).to(tl.int32)
    inner = reaching(row, NEAR)[:, None] * pitch + column[None, :]
    return start, inner, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def packed(on, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Eight neighbours of a row of the tile in a byte."""
    eights = tl.reshape(on.to(tl.int32), [ROWS, COLUMNS // 8, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpacked(packed_bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bits of `packed` as a tile of booleans."""
    eights = (packed_bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eights, [ROWS, COLUMNS]) != 0


@triton.jit
def is_last(counter, SPLITS):
    """Whether the other programs have stored their partial results; the last one sets the counter back.

    The barrier comes first, so that the one thread that counts has the stores of all threads behind it.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def partials_at(partials, kind: tl.constexpr, group, split, channel, C, splits, groups):
    """Where one of the PARTIALS of some splits lies: (kind, group, split, channel)."""
    row = (tl.cast(group, tl.int64) + kind * groups) * splits + split
    return partials + row * C + channel

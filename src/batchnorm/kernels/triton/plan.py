"""How a tensor is cut into tiles and programs: frozen data, computed from numbers alone.

Both memory layouts are one picture: groups of samples, a sample of C channels and S positions. Where the channel is the
fastest axis (`last`: channels-last and 2-D input) a group is one sample, whose positions are its rows.
A tile has some positions and some channels. *Pieces* are the tiles of one block of channels, in the order of memory; a
reduction gives each program `per` of them in a row, a sweep (an elementwise pass) one.

Grids have one axis, because the second ends at 65,535. What is called measured was measured on an H100 80GB, bfloat16,
channels-last, over the 53 batch norms of ResNet-50 at batch 128, forward + backward: 9.4 ms in all.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

__all__ = [
    "Layout",
    "Machine",
    "Plan",
    "Reduction",
    "Sweep",
    "Tile",
    "View",
    "bytes_of_bits",
    "layout_of",
    "plan_of",
    "registers",
]

# Elements of a tile. Measured: 64 rows × 64 channels against 64 × 128 and 32 rows; larger ones were never faster.
TILE = 4096
# Channels of a tile in rows. Measured, as above: 64 bfloat16 are a cache line.
CHANNELS = 64
# Elements of a tile that a warp holds, by direction: 4 warps forward, 8 backward for a tile of 4096. Measured.
FORWARD_WARP, BACKWARD_WARP = 1024, 512
# Where the fastest axis is odd or twice odd every element has a load and an address of its own: tiles are half as
# large for as many warps. Not measured; else the kernels need more registers than WARPS leave (compiled for sm_90).
ALONE = 4
# Warps that a reduction starts for each multiprocessor: enough to hide the latency of memory, few enough that the
# partial results are soon merged. Measured: 4 programs of 4 warps forward and 2 of 8 backward, out of 1, 2 and 4.
WARPS = 16
# A program has at least two pieces, or the merge of the partial results costs more than it saves (measured), and at
# most 256: so many numbers are added one after the other in float32, and the error grows with them (not measured; the
# 53 layers above have at most 96).
FEWEST, MOST = 2, 256
# Lanes of a tile that may be idle before a smaller block is taken. Not measured: 14 × 14 and 7 × 7 positions then fill
# 256 and 64 to three quarters, and 96 channels are three blocks of 32.
IDLE = 0.25
# Positions of a tile in planes: between 8, a byte of bits, and 1024.
FEWEST_POSITIONS, MOST_POSITIONS = 8, 1024


class Layout(NamedTuple):
    """A dense tensor (N, C, *S) as three sizes, and whether the channel is its fastest axis."""

    samples: int
    channels: int
    positions: int
    last: bool


class View(NamedTuple):
    """Groups of samples of channels and positions, as the kernels see a tensor."""

    groups: int
    samples: int
    channels: int
    positions: int
    last: bool


@dataclass(frozen=True)
class Machine:
    """What a plan depends on besides the shape; the interpreter gets small tiles, so that small shapes have many."""

    multiprocessors: int
    tile: int = TILE
    channels: int = CHANNELS


class Tile(NamedTuple):
    """Positions × channels of a tile, powers of two, and the warps that hold it."""

    positions: int
    channels: int
    warps: int


class Reduction(NamedTuple):
    """Programs of a reduction: for each group `splits` × `blocks`, each with `per` of the `pieces` of its channels."""

    tile: Tile
    blocks: int
    pieces: int
    per: int
    splits: int
    programs: int


class Sweep(NamedTuple):
    """Programs of an elementwise pass: one a tile, `runs` blocks of positions a sample and `blocks` of channels."""

    tile: Tile
    blocks: int
    runs: int
    programs: int


class Plan(NamedTuple):
    """The four kernels for one shape.

    `align` is the largest power of two up to 16 that divides the fastest axis, `near` says that 32 bits number the
    elements from the first of a tile to its last.
    """

    view: View
    align: int
    near: bool
    moments: Reduction
    normalize: Sweep
    grad_sums: Reduction
    grad_input: Sweep


@lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout | None:
    """How a tensor (N, C, *S) lies in memory; None where it is not dense in either order.

    >>> layout_of((8, 3, 5, 5), (75, 1, 15, 3))
    Layout(samples=8, channels=3, positions=25, last=True)
    """
    positions = prod(shape[2:])
    if _dense(shape, strides):
        return Layout(shape[0], shape[1], positions, positions == 1 and shape[1] != 1)
    if _dense((shape[0], *shape[2:], shape[1]), (strides[0], *strides[2:], strides[1])):
        return Layout(shape[0], shape[1], positions, shape[1] != 1)
    return None


def _dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def bytes_of_bits(samples: int, channels: int, positions: int) -> tuple[int, int]:
    """Bytes that hold one bit an element: (with the channel last, else). Every row, or plane, begins a new byte.

    >>> bytes_of_bits(2, 12, 49)
    (196, 168)
    """
    return samples * positions * ((channels + 7) // 8), samples * channels * ((positions + 7) // 8)


@lru_cache(maxsize=4096)
def plan_of(layout: Layout, groups: int, wide: bool, machine: Machine) -> Plan:
    """The plan for a tensor in `groups` groups; `wide` says that its arithmetic is float64.

    >>> plan = plan_of(Layout(128, 256, 56 * 56, True), 1, False, Machine(multiprocessors=132))
    >>> plan.moments.tile, plan.moments.splits
    (Tile(positions=64, channels=64, warps=4), 131)
    """
    view = _view(layout, groups)
    fastest = view.channels if view.last else view.positions
    align = min(16, fastest & -fastest) if fastest else 1
    share = (2 if wide else 1) * (2 if align < ALONE else 1)
    size = machine.tile // share
    positions, channels = _rows(view, size, machine) if view.last else _planes(view, size)
    elements = positions * channels
    forward = Tile(positions, channels, _warps(elements * share, FORWARD_WARP))
    backward = Tile(positions, channels, _warps(elements * share, BACKWARD_WARP))
    return Plan(
        view,
        align,
        (positions * view.channels if view.last else channels * view.positions) < 2**31,
        _reduction(view, forward, machine),
        _sweep(view, forward),
        _reduction(view, backward, machine),
        _sweep(view, backward),
    )


def registers(wide: bool) -> int | None:
    """The registers of a thread of a reduction, so that WARPS find room on a multiprocessor, which has 65,536.

    Without a limit: 97 to 154 compiled for sm_90, 208 for 7 × 7 planes. float64 takes twice as many and has none.
    """
    return None if wide else 65_536 // (WARPS * 32)


def _view(layout: Layout, groups: int) -> View:
    samples = layout.samples // groups
    if layout.last:
        return View(groups, 1, layout.channels, samples * layout.positions, True)
    if layout.channels == 1:  # nothing lies between two samples
        return View(groups, 1, 1, samples * layout.positions, False)
    return View(groups, samples, layout.channels, layout.positions, False)


def _rows(view: View, size: int, machine: Machine) -> tuple[int, int]:
    channels = _block(view.channels, 8, min(machine.channels, size))
    return min(size // channels, _power(view.positions)), channels


def _planes(view: View, size: int) -> tuple[int, int]:
    positions = _block(view.positions, FEWEST_POSITIONS, min(MOST_POSITIONS, size))
    channels = min(_power(view.channels), size // positions)
    longest = size // channels
    if longest > positions:
        positions = max(positions, _block(view.positions, FEWEST_POSITIONS, longest))
    return positions, channels


def _block(length: int, fewest: int, most: int) -> int:
    """The largest power of two to `most` that leaves at most IDLE of its lanes idle, or the one with the fewest."""
    sizes = []
    size = min(most, max(fewest, _power(length)))
    while size >= fewest:
        sizes.append(size)
        size //= 2
    idle = {size: 1 - length / (_ceil(length, size) * size) for size in sizes}
    return next((size for size in sizes if idle[size] <= IDLE), min(sizes, key=lambda size: idle[size]))


def _reduction(view: View, tile: Tile, machine: Machine) -> Reduction:
    programs = machine.multiprocessors * max(1, WARPS // tile.warps)
    blocks = _ceil(view.channels, tile.channels)
    pieces = view.samples * _ceil(view.positions, tile.positions)
    splits = max(1, min(_ceil(pieces, FEWEST), _ceil(programs, max(1, blocks * view.groups))))
    per = min(MOST, _ceil(pieces, splits))
    splits = _ceil(pieces, per)
    return Reduction(tile, blocks, pieces, per, splits, view.groups * blocks * splits)


def _sweep(view: View, tile: Tile) -> Sweep:
    blocks, runs = _ceil(view.channels, tile.channels), _ceil(view.positions, tile.positions)
    return Sweep(tile, blocks, runs, view.groups * view.samples * blocks * runs)


def _warps(elements: int, a_warp: int) -> int:
    return max(1, elements // a_warp)


def _power(length: int) -> int:
    """The smallest power of two that is not below `length`."""
    return 1 << max(0, length - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b) if b else 0

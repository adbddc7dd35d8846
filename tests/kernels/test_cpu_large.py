"""The CPU kernels where tensors are larger than the caches: channels in panels, stores past the caches; and the half
types' float sums where float cannot hold them."""

from collections.abc import Iterator

import pytest
import torch
from helpers import SLOPE, lay_out, same_bits
from torch import Tensor

from batchnorm import reference
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import launch

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())

EPS = 1e-3
# Channels that panels divide evenly and not, runs that are and are not a multiple of a vector, side by side and one
# after the other, one sample and several; more than half of a large cache, so that stores pass it.
PANELS = [(4, 40, 160, 160), (3, 48, 101, 103), (9, 496, 27, 27), (1, 33, 360, 360), (40, 512, 14, 14)]


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(x: Tensor, dy: Tensor, residual: Tensor | None, activation: str | None) -> tuple[Tensor, ...]:
    weight, bias = torch.linspace(-1, 2, x.shape[1]), torch.linspace(1, -1, x.shape[1])
    y, mean, var, count, saved = launch.forward(x, weight, bias, residual, None, 1, EPS, activation, SLOPE)
    grads = launch.backward(
        dy, x, mean, var, count, weight, bias, saved, residual is not None, None, EPS, activation, SLOPE
    )
    return y, mean, var, *(grad for grad in grads if grad is not None and grad.numel())


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", PANELS, ids=str)
def test_panels_do_not_change_a_bit(shape: tuple[int, ...], residual: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
        r = torch.randn(shape).to(dtype) if residual else None
        torch.set_num_threads(1)
        first = step(x, dy, r, "relu")
        # As many threads as make one panel of all channels, and some between.
        for threads in (2, 3, shape[1]):
            torch.set_num_threads(threads)
            for mine, other in zip(step(x, dy, r, "relu"), first, strict=True):
                assert same_bits(mine, other)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 40, 160, 160), (9, 497, 31, 31), (24, 50, 61, 61)], ids=str)
def test_large(shape: tuple[int, ...], layout: str) -> None:
    x, dy, r = (lay_out(torch.randn(shape), layout) for _ in range(3))
    mine = step(x, dy, r, "relu")
    weight, bias = torch.linspace(-1, 2, shape[1]).double(), torch.linspace(1, -1, shape[1]).double()
    wide = x.double(), weight, bias, r.double()
    y, mean, var, count, saved = reference.forward(*wide, None, 1, EPS, "relu", SLOPE)
    # What lies within a rounding of the kink may fall on either side.
    assert ((mine[0] > 0) != (y > 0)).double().mean() < 1e-5
    dy = torch.where((mine[0] > 0) == (y > 0), dy, torch.zeros_like(dy))
    mine = step(x, dy, r, "relu")
    grads = reference.backward(
        dy.double(), wide[0], mean, var, count, weight, bias, saved, True, None, EPS, "relu", SLOPE
    )
    for one, truth in zip(mine, (y, mean, var, *grads), strict=True):
        assert truth is not None
        assert (one.double() - truth).abs().max() <= 3e-7 * truth.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "short"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-19, 1.0, 1e18, 1e30], ids=str)
def test_half_statistics_of_any_size(size: float, layout: str) -> None:
    """Squares of bfloat16 are added in float, where it can hold them."""
    shape = (12, 5, 7, 7) if layout == "short" else (3, 5, 60, 41)
    x = (torch.randn(shape, dtype=torch.float64) * size + 3 * size).to(torch.bfloat16)
    x[:, 2] = 0  # a dead channel
    x[:, 3] = 7 * size  # a constant one
    x = lay_out(x, "channels_last" if layout == "channels_last" else "contiguous")
    mean, m2, _ = launch.moments(x, None, 1)
    true_mean, true_m2, _ = reference.moments(x.double(), None, 1)
    assert ((mean - true_mean).abs() <= 6e-8 * true_mean.abs()).all()
    assert ((m2 - true_m2).abs() <= 2e-7 * true_m2).all()
    assert m2[0, 2] == m2[0, 3] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "short"])
def test_half_gradients_of_any_size(layout: str, dtype: torch.dtype) -> None:
    shape = (12, 5, 7, 7) if layout == "short" else (3, 5, 60, 41)
    sizes = (1e-30, 1.0, 1e37) if dtype == torch.bfloat16 else (1e-4, 1.0, 1e3)
    for x_size in sizes:
        for dy_size in sizes:
            x = (torch.randn(shape, dtype=torch.float64) * x_size).to(dtype)
            dy = (torch.randn(shape, dtype=torch.float64) * dy_size + dy_size).to(dtype)
            kind = "channels_last" if layout == "channels_last" else "contiguous"
            x, dy = lay_out(x, kind), lay_out(dy, kind)
            mean, m2, count = reference.moments(x.double(), None, 1)
            invstd = (m2 / count + 1e-70).rsqrt()
            call = (mean, invstd, None, None, torch.empty(0, dtype=torch.uint8), False, None, None, 0.0)
            mine = launch.grad_sums(dy, x, *call)
            truth = reference.grad_sums(dy.double(), x.double(), *call)
            # Of Σ|g|, that is, because sums of both signs may cancel.
            room = 3e-7 * dy.double().abs().sum(dim=(0, 2, 3))
            for one, other in zip(mine, truth, strict=True):
                assert ((one - other).abs() <= room).all()


def test_nan_in_one_channel_of_half_types_stays_there() -> None:
    for layout in ("contiguous", "channels_last"):
        x, dy = (lay_out(torch.randn(4, 6, 30, 30).bfloat16(), layout) for _ in range(2))
        clean = step(x, dy, None, "relu")
        x[1, 2, 3, 4] = torch.nan
        dirty = step(x, dy, None, "relu")
        others = torch.tensor([0, 1, 3, 4, 5])
        for one, other in zip(dirty, clean, strict=True):
            axis = 0 if one.dim() == 1 else 1
            assert same_bits(one.index_select(axis, others), other.index_select(axis, others))
        assert dirty[1][0, 2].isnan()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "short"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_beside_one_that_is_much_larger(dtype: torch.dtype, layout: str) -> None:
    """Wherever it stands: the first one's value must not be taken off all others in float."""
    shape = (400, 3, 5, 6) if layout == "short" else (4, 3, 60, 51)
    x, dy = torch.randn(shape).to(dtype), (torch.rand(shape) * 1e-3).to(dtype)
    for channel, place in enumerate((0, -1)):
        dy[place, channel, place, place] = 6e4
    kind = "channels_last" if layout == "channels_last" else "contiguous"
    x, dy = lay_out(x, kind), lay_out(dy, kind)
    mean, m2, count = reference.moments(x.double(), None, 1)
    call = (mean, (m2 / count).rsqrt(), None, None, torch.empty(0, dtype=torch.uint8), False, None, None, 0.0)
    room = 3e-7 * dy.double().abs().sum(dim=(0, 2, 3))
    truth = reference.grad_sums(dy.double(), x.double(), *call)
    for one, other in zip(launch.grad_sums(dy, x, *call), truth, strict=True):
        assert ((one - other).abs() <= room).all()


# Rows of 4 · 1 · 255 and 16 · 99 elements side by side, and a last one of more than a tile (512 elements).
@pytest.mark.parametrize("shape", [(261, 255), (1007, 99), (263, 51, 5)], ids=str)
def test_a_last_row_longer_than_a_tile(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, dy, r = ((torch.randn(shape) + 1).to(dtype) for _ in range(3))
        mine = step(x, dy, r, None)
        weight, bias = torch.linspace(-1, 2, shape[1]).double(), torch.linspace(1, -1, shape[1]).double()
        wide = x.double(), weight, bias, r.double()
        y, mean, var, count, saved = reference.forward(*wide, None, 1, EPS, None, SLOPE)
        grads = reference.backward(
            dy.double(), wide[0], mean, var, count, weight, bias, saved, True, None, EPS, None, SLOPE
        )
        room = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
        for one, truth in zip(mine, (y, mean, var, *grads), strict=True):
            assert truth is not None
            assert (one.double() - truth).abs().max() <= room * truth.abs().max()

"""Masks and groups in the CPU kernels, against the reference in float64."""

from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, RELU_LIKE, SLOPE, lay_out, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import batchnorm
from batchnorm import reference
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import launch

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=cpu.why_not()),
    pytest.mark.usefixtures("_poisoned_memory"),
]

EPS = 1e-3
NAN = float("nan")
# Relative to the largest value: arithmetic in float64, rounded once.
ROOM = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-24 * 1.01,
    torch.bfloat16: 2.0**-8 * 1.01,
    torch.float16: 2.0**-11 * 1.01,
}
# One channel (a run in either order), few and many channels, runs around a piece (512) and a block (16384), and sizes
# that leave a rest everywhere.
SHAPES = [
    (600, 1), (5, 1, 7), (131, 5), (300, 257), (9, 1100), (3, 5, 7), (6, 2, 4, 4), (3, 4, 33), (2, 3, 31, 37),
    (2, 2, 150, 111), (19, 3, 45), (5, 600, 3), (2, 63, 64), (1300, 3), (4, 1, 9001),
]  # fmt: skip


@pytest.fixture
def _poisoned_memory() -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def make_mask(kind: str, shape: tuple[int, ...]) -> Tensor:
    """(N, *S): bool, frequencies, or weights, about a third of them 0."""
    shape = (shape[0], *shape[2:])
    valid = torch.rand(shape) < 0.7
    if kind == "bool":
        return valid
    if kind == "frequencies":
        return torch.randint(1, 5, shape) * valid
    if kind == "all":
        return torch.ones(shape, dtype=torch.bool)
    return torch.rand(shape) * 10 ** torch.randint(-3, 2, shape).double() * valid


class Data:
    """Random arguments of a call, with NaN in all of them where the mask is 0."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool, kind: str = "bool",
        parameters: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.mask = make_mask(kind, shape)
        hole = (self.mask == 0).unsqueeze(1)

        def draw(scale: float, shift: float) -> Tensor:
            return lay_out((torch.randn(shape) * scale + shift).masked_fill(hole, NAN).to(dtype), layout)

        self.hole = hole.expand(shape)
        self.x, self.dy, r = draw(2, 1), draw(1, 0.5), draw(1, 0)
        self.r = r if residual else None
        self.weight, self.bias = (torch.randn(parameters or (shape[1],)).to(dtype) for _ in range(2))

    def call(self, wide: bool = False) -> tuple[Any, ...]:
        tensors = (self.x, self.weight, self.bias, self.r)
        return tuple(t.double() if wide and t is not None else t for t in tensors)


def near(mine: Tensor, truth: Tensor, room: float, name: str = "", least: float = 1e-300) -> None:
    assert mine.shape == truth.shape, name
    if truth.numel():
        assert not mine.isnan().any(), name
        scale = truth.abs().max().clamp_min(least)
        assert ((mine.double() - truth).abs().max() / scale).item() <= room, name


def agree(data: Data, activation: str | None, room: float, groups: int = 1) -> None:
    """`forward`, `backward` and the four primitives, each against the reference on the same values."""
    x, weight, bias, r = data.call()
    wide, dy, mask = data.call(wide=True), data.dy, data.mask
    rule = (activation, SLOPE)
    y, mean, var, count, saved = launch.forward(*data.call(), mask, groups, EPS, *rule)
    truth = reference.forward(*wide, mask, groups, EPS, *rule)
    near(y, truth[0], room, "output")
    assert y.stride() == torch.empty_like(x).stride()
    assert saved.shape == truth[4].shape
    for mine, other, name in zip((mean, var, count), truth[1:4], ("mean", "var", "count"), strict=True):
        near(mine, other, 1e-13, name)
    bits = r is not None and activation in RELU_LIKE
    k, kr = (saved, truth[4]) if bits or r is None or activation is None else (r, wide[3])
    if bits:
        differ = (launch.unpack(saved, x) != reference.unpack(truth[4], x)) & ~data.hole
        assert not differ.any()
    gradients = launch.backward(dy, x, mean, var, count, weight, bias, k, r is not None, mask, EPS, *rule)
    expected = reference.backward(
        dy.double(), wide[0], *truth[1:4], *wide[1:3], kr, r is not None, mask, EPS, *rule
    )
    # All of dx may cancel, as that of a single valid value does: its rounding is that of what is subtracted.
    least = 1e-3 * (weight.abs().max() / EPS**0.5 * dy.nan_to_num().abs().max()).item() if dy.numel() else 1
    least = max(least, 1e-300)
    for mine, other, name in zip(gradients, expected, ("dx", "dweight", "dbias", "dresidual"), strict=True):
        near(mine, other, 2 * room, name, least if name == "dx" else 1e-300)
    for value in (y, gradients[0], *([gradients[3]] if r is not None else [])):
        assert (value[data.hole] == 0).all()
    invstd = (var + EPS).rsqrt()
    near(launch.moments(x, mask, groups)[1], var * count, 1e-12, "m2")
    near(launch.normalize(x, mean, invstd, weight, bias, r, mask, *rule)[0], truth[0], room, "normalize")
    tail = (weight, bias, k, r is not None, mask)
    sums = launch.grad_sums(dy, x, mean, invstd, *tail, *rule)
    true_sums = reference.grad_sums(
        dy.double(), wide[0], mean, invstd, *wide[1:3], kr, r is not None, mask, *rule
    )
    for mine, other in zip(sums, true_sums, strict=True):
        # silu and gelu of half types are PyTorch's in float32
        half = x.element_size() == 2 and activation in ("silu", "gelu")
        near(mine, other, 1e-6 if half else 1e-11, "sums")
    dx, dr = launch.grad_input(dy, x, mean, invstd, *tail, *true_sums, count, *rule)
    near(dx, expected[0], 2 * room, "grad_input", least)
    near(dr, expected[3], 2 * room, "grad_residual")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_layout(shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float64, torch.float32):
        agree(Data(shape, dtype, layout, residual=False), None, ROOM[dtype])
        agree(Data(shape, dtype, layout, residual=True, kind="weights"), "relu", ROOM[dtype])


@pytest.mark.parametrize("kind", ["bool", "frequencies", "weights", "all"])
@pytest.mark.parametrize("dtype", list(ROOM), ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_every_dtype_activation_and_kind(
    residual: bool, activation: str | None, dtype: torch.dtype, kind: str
) -> None:
    for shape, layout in (
        ((40, 6), "contiguous"),
        ((3, 5, 7, 9), "contiguous"),
        ((3, 5, 7, 9), "channels_last"),
    ):
        data = Data(shape, dtype, layout, residual, kind)
        # Kinks: relu6 and hardswish have theirs at 6 and ±3.
        data.weight, data.bias = data.weight * 3, data.bias * 0.1
        agree(data, activation, ROOM[dtype])


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "hardswish"])
@pytest.mark.parametrize("parameters", ["C", "GC"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_groups(samples: int, layout: str, parameters: str, activation: str | None) -> None:
    # 3·7 elements a sample: the bits of a group begin in the middle of a byte; 8·16: they do not.
    for shape in ((4 * samples, 3, 7), (4 * samples, 8, 4, 4)):
        own = (4, shape[1]) if parameters == "GC" else None
        for residual in (False, True):
            for kind in ("all", "weights"):
                data = Data(shape, torch.float64, layout, residual, kind, own)
                if kind == "all":
                    data.mask = None  # type: ignore[assignment]
                # Of a single position a group may have, dx is what rounding leaves of 0.
                agree(data, activation, 1e-11, groups=4)


@settings(max_examples=150)
@given(
    shape=st.tuples(
        st.integers(2, 40), st.integers(1, 300), st.sampled_from([1, 2, 3, 16, 31, 63, 65, 200, 513, 1025])
    ),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    kind=st.sampled_from(["bool", "frequencies", "weights", "all"]),
)
def test_any_shape(
    shape: tuple[int, int, int], layout: str, activation: str | None, residual: bool, kind: str
) -> None:
    torch.manual_seed(0)  # the same numbers when hypothesis runs an example again
    agree(Data(shape, torch.float64, layout, residual, kind), activation, 1e-11)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    agree(Data(shape, torch.float32, "contiguous", True), "relu", 0)


def test_no_channels() -> None:
    for shape in ((4, 0, 3), (0, 0)):
        data = Data(shape, torch.float32, "contiguous", True)
        y, mean, _, count, saved = launch.forward(*data.call(), data.mask, 1, EPS, "relu", SLOPE)
        assert y.shape == shape
        assert mean.shape == (1, 0)
        assert count.shape == (1, 1)
        assert saved.numel() == 0


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 40), (5, 1, 40)], ids=str)
def test_nothing_valid(shape: tuple[int, ...]) -> None:
    data = Data(shape, torch.float32, "contiguous", True)
    data.mask = torch.zeros_like(data.mask)
    data.hole = torch.ones_like(data.hole)
    agree(data, "relu", 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_channel_with_nan_stays_alone(layout: str) -> None:
    data = Data((6, 70, 40), torch.float32, layout, False)
    valid = (~data.hole[:, 0]).nonzero()[20]
    other = Data.__new__(Data)
    other.__dict__ = {**data.__dict__, "x": data.x.clone()}
    other.x[valid[0], 7, valid[1]] = NAN
    mine, clean = (launch.forward(*d.call(), d.mask, 1, EPS, None, SLOPE) for d in (other, data))
    rest = torch.arange(70) != 7
    assert same_bits(mine[0][:, rest], clean[0][:, rest])
    assert mine[0][:, 7][~data.hole[:, 7]].isnan().all()
    assert (mine[0][:, 7][data.hole[:, 7]] == 0).all()
    assert mine[1][0, 7].isnan()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["bool", "weights"])
def test_offsets_a_million_times_the_spread(kind: str, layout: str) -> None:
    for shape in ((50, 3, 40), (50, 90, 4)):
        data = Data(shape, torch.float64, layout, False, kind)
        data.x, data.dy = data.x + 1e7, data.dy + 1e6
        agree_up_to_offsets(data)


def agree_up_to_offsets(data: Data) -> None:
    y, mean, var, count, saved = launch.forward(*data.call(), data.mask, 1, EPS, None, SLOPE)
    truth = reference.forward(*data.call(), data.mask, 1, EPS, None, SLOPE)
    near(y, truth[0], 1e-12)
    tail = (data.weight, data.bias, saved, False, data.mask, EPS, None, SLOPE)
    mine = launch.backward(data.dy, data.x, mean, var, count, *tail)
    other = reference.backward(data.dy, data.x, *truth[1:4], *tail)
    for value, expected in zip(mine[:3], other[:3], strict=True):
        near(value, expected, 1e-11)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_constant_channel_is_exactly_the_bias(layout: str) -> None:
    x = lay_out(torch.full((7, 5, 33), 100.1), layout)
    weight, bias = torch.randn(2, 5)
    mask = make_mask("weights", x.shape)
    y, mean, var, _, _ = launch.forward(x, weight, bias, None, mask, 1, EPS, None, SLOPE)
    assert (var == 0).all()
    assert (mean == x[0, 0, 0].double()).all()
    valid = (mask > 0).unsqueeze(1)
    assert torch.equal(y, torch.where(valid, bias[:, None], 0.0).expand(x.shape))


@pytest.mark.parametrize(("shape", "layout"), [
    ((200_003, 3), "contiguous"), ((1000, 400), "contiguous"), ((5, 7, 150, 149), "contiguous"),
    ((5, 7, 150, 149), "channels_last"), ((2, 1, 90_001), "contiguous"), ((40, 300, 25), "contiguous"),
], ids=str)  # fmt: skip
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], layout: str) -> None:
    data = Data(shape, torch.float32, layout, residual=True, kind="weights")
    seen: list[tuple[Tensor, ...]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 3):
            torch.set_num_threads(threads)
            y, mean, var, count, saved = launch.forward(*data.call(), data.mask, 1, EPS, "relu", SLOPE)
            gradients = launch.backward(
                data.dy, data.x, mean, var, count, data.weight, data.bias, saved, True, data.mask, EPS, "relu", SLOPE
            )  # fmt: skip
            seen.append((y, mean, var, saved, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(map(same_bits, other, seen[0]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_masked_calls_are_run_by_the_kernels(training: bool) -> None:
    x = torch.randn(4, 3, 6)
    choice = batchnorm.explain_backend(x, training=training, mask=torch.ones(6))
    assert choice.chosen == "cpu"
    layer = batchnorm.BatchNorm1d(3, backend="cpu", activation="silu").train(training)
    other = batchnorm.BatchNorm1d(3, backend="reference", activation="silu").train(training)
    for _ in range(2):
        y, expected = (one(x, mask=torch.arange(6) < 4) for one in (layer, other))
        near(y, expected.double(), 1e-6)
    for name, value in layer.state_dict().items():
        near(value, other.state_dict()[name].double(), 1e-6, name)

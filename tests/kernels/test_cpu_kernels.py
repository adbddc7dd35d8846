"""The CPU kernels against the reference in float64: every function, dtype, layout, activation and residual."""

import importlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, RELU_LIKE, SLOPE, lay_out, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import reference
from batchnorm.kernels import cpu
from batchnorm.kernels.cpu import launch
from batchnorm.ops.aten import Running

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason=cpu.why_not()),
    pytest.mark.usefixtures("_poisoned_memory"),
]

EPS = 1e-3
# Relative to the largest value. A float32 result passes through some ten roundings, a half one through one more.
ROOM = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2.0**-8 * 1.01,
    torch.float16: 2.0**-11 * 1.01,
}
# The means and variances: two bytes an element are added up in float, some at a time.
STATISTICS = dict.fromkeys(ROOM, 1e-12) | {torch.bfloat16: 6e-8, torch.float16: 6e-8}
DTYPES = list(ROOM)
# Rows (2-D, few and many channels, more rows than a chunk), planes shorter and longer than a vector, than a mini-block
# (1024) and than a piece (16384), and sizes that leave a rest everywhere. Not two values a channel: their dx is what
# rounding leaves of a difference that would be 0.
SHAPES = [
    (5, 1), (4, 8), (7, 3), (131, 5), (300, 257), (9, 1100), (3, 5, 7), (6, 2, 4, 4), (3, 4, 33), (2, 3, 31, 37),
    (1, 2, 150, 111), (19, 3, 45), (5, 600, 3), (2, 1, 64),
]  # fmt: skip


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Data:
    """Random arguments of a call; `wide` are the same values in float64."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: str, residual: bool, affine: bool = True
    ) -> None:
        def draw(scale: float, shift: float) -> Tensor:
            return lay_out((torch.randn(shape) * scale + shift).to(dtype), layout)

        self.x, self.dy, r = draw(2, 1), draw(1, 0.5), draw(1, 0)
        self.r = r if residual else None
        self.weight = torch.randn(shape[1]).to(dtype) if affine else None
        self.bias = torch.randn(shape[1]).to(dtype) if affine else None

    def call(self, wide: bool) -> tuple[Any, ...]:
        tensors = (self.x, self.weight, self.bias, self.r)
        return tuple(t.double() if wide and t is not None else t for t in tensors)


def kept(saved: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    return saved if residual is None or activation in (None, *RELU_LIKE) else residual


def near(mine: Tensor, truth: Tensor, room: float, name: str = "") -> None:
    assert mine.shape == truth.shape, name
    if truth.numel() == 0:
        return
    assert not mine.isnan().any(), name
    scale = truth.abs().max().clamp_min(1e-300)
    assert ((mine.double() - truth).abs().max() / scale).item() <= room, name


def agree(data: Data, activation: str | None, room: float) -> None:
    """`forward`, `backward` and the four primitives, each against the reference on the same values."""
    x, weight, bias, r = data.call(False)
    wide = data.call(True)
    dy = data.dy
    rule = (activation, SLOPE)
    y, mean, var, count, saved = launch.forward(*data.call(False), None, 1, EPS, *rule)
    truth = reference.forward(*wide, None, 1, EPS, *rule)
    near(y, truth[0], room, "output")
    assert y.stride() == torch.empty_like(x).stride()
    for mine, other, name in zip((mean, var, count), truth[1:4], ("mean", "var", "count"), strict=True):
        near(mine, other, STATISTICS[x.dtype], name)
    # An element within a rounding of the activation's kink may fall on either side: the bits are the kernel's own, and
    # gradients are compared where both agree.
    k, kr = kept(saved, r, activation), kept(truth[4], wide[3], activation)
    if r is not None and activation in RELU_LIKE:
        mine_on, true_on = launch.unpack(saved, x), reference.unpack(truth[4], x)
        dy = torch.where(mine_on == true_on, dy, torch.zeros_like(dy))
        assert (mine_on != true_on).double().mean() < 0.01
    gradients = launch.backward(dy, x, mean, var, count, weight, bias, k, r is not None, None, EPS, *rule)
    expected = reference.backward(
        dy.double(), wide[0], *truth[1:4], *wide[1:3], kr, r is not None, None, EPS, *rule
    )
    for mine, other, name in zip(gradients, expected, ("dx", "dweight", "dbias", "dresidual"), strict=True):
        near(mine, other, 4 * room, name)
    invstd = (var + EPS).rsqrt()
    moments = launch.moments(x, None, 1)
    near(moments[1], var * count, STATISTICS[x.dtype], "m2")
    again, saved_again = launch.normalize(x, mean, invstd, weight, bias, r, None, *rule)
    near(again, truth[0], room, "normalize")
    assert same_bits(saved_again, saved) or x.dtype == torch.float64
    sums = launch.grad_sums(dy, x, mean, invstd, weight, bias, k, r is not None, None, *rule)
    true_sums = reference.grad_sums(
        dy.double(), wide[0], mean, invstd, *wide[1:3], kr, r is not None, None, *rule
    )
    for mine, other in zip(sums, true_sums, strict=True):
        near(mine, other, 8 * room)
    dx, dr = launch.grad_input(
        dy, x, mean, invstd, weight, bias, k, r is not None, None, *true_sums, count, *rule
    )
    near(dx, expected[0], 4 * room)
    near(dr, expected[3], 4 * room)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_layout(shape: tuple[int, ...], layout: str) -> None:
    for dtype in (torch.float64, torch.float32):
        agree(Data(shape, dtype, layout, residual=False), None, ROOM[dtype])
        agree(Data(shape, dtype, layout, residual=True), "relu", ROOM[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_every_dtype_and_activation(residual: bool, activation: str | None, dtype: torch.dtype) -> None:
    # float32 gelu and silu are PyTorch's, some 3e-6 of the largest gradient off
    room = 2e-6 if dtype == torch.float32 and activation in ("silu", "gelu") else ROOM[dtype]
    for shape, layout in (
        ((40, 6), "contiguous"),
        ((3, 5, 7, 9), "contiguous"),
        ((3, 5, 7, 9), "channels_last"),
    ):
        data = Data(shape, dtype, layout, residual)
        # Kinks: relu6 and hardswish have theirs at 6 and ±3.
        if data.weight is not None:
            data.weight = data.weight * 3
        if residual or activation not in (*RELU_LIKE, "hardswish") or dtype == torch.float64:
            agree(data, activation, room)
        else:
            # The kink lies between two roundings of z for some element: the output is compared, not the gradient.
            y = launch.forward(*data.call(False), None, 1, EPS, activation, SLOPE)[0]
            near(y, reference.forward(*data.call(True), None, 1, EPS, activation, SLOPE)[0], room)


@settings(max_examples=150)
@given(
    shape=st.tuples(
        st.integers(2, 40), st.integers(1, 300), st.sampled_from([1, 2, 3, 16, 31, 32, 33, 63, 65, 200])
    ),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    affine=st.booleans(),
)
def test_any_shape(
    shape: tuple[int, int, int], layout: str, activation: str | None, residual: bool, affine: bool
) -> None:
    agree(Data(shape, torch.float64, layout, residual, affine), activation, 1e-11)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (4, 0, 3), (0, 0)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    data = Data(shape, torch.float32, "contiguous", True)
    y, mean, var, count, saved = launch.forward(*data.call(False), None, 1, EPS, "relu", SLOPE)
    assert y.shape == shape
    assert (mean == 0).all()
    assert (var == 0).all()
    assert count.item() == 0
    gradients = launch.backward(
        data.dy, data.x, mean, var, count, data.weight, data.bias, saved, True, None, EPS, "relu", SLOPE
    )
    assert gradients[0].shape == shape
    assert (gradients[1] == 0).all()
    assert (gradients[2] == 0).all()


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize(("shape", "layout"), [
    ((200_003, 3), "contiguous"), ((1000, 400), "contiguous"), ((5, 7, 150, 149), "contiguous"),
    ((5, 7, 150, 149), "channels_last"), ((2, 90_001), "contiguous"), ((40, 300, 25), "contiguous"),
], ids=str)  # fmt: skip
def test_same_bits_for_any_number_of_threads(shape: tuple[int, ...], layout: str) -> None:
    data = Data(shape, torch.float32, layout, residual=True)
    seen = []
    for threads in (1, 2, 4, 4, 3):
        torch.set_num_threads(threads)
        seen.append(step(data, "relu"))
    for other in seen[1:]:
        assert all(map(same_bits, other, seen[0]))


@pytest.fixture
def _widest_vectors() -> Iterator[None]:
    yield
    _cpu().use_vectors(64)


def _cpu() -> Any:
    return importlib.import_module("batchnorm.kernels.cpu._cpu")


@pytest.mark.usefixtures("_widest_vectors")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout", "residual", "activation"), [
    ((19, 3, 45), "contiguous", True, "relu"), ((3, 70, 7, 7), "contiguous", True, "leaky_relu"),
    ((2, 3, 31, 37), "contiguous", False, "relu6"), ((6, 5, 33), "contiguous", True, "hardswish"),
    ((41, 2, 9, 9), "channels_last", False, "hardswish"), ((131, 5), "contiguous", True, None),
    ((300, 521), "contiguous", True, "relu"), ((3, 3), "contiguous", True, "relu"),
    # Two, four and seven lanes or elements left over: fewer than some levels' vectors have.
    ((300, 514), "contiguous", False, "relu"), ((300, 516), "contiguous", True, None),
    ((300, 519), "contiguous", False, None), ((2, 2, 515), "contiguous", False, None),
    ((2, 3, 16389), "contiguous", True, "relu"),
], ids=str)  # fmt: skip
def test_same_bits_at_every_level_of_the_processor(
    shape: tuple[int, ...], layout: str, residual: bool, activation: str | None, dtype: torch.dtype
) -> None:
    data = Data(shape, dtype, layout, residual)
    seen = {}
    for most in (64, 32, 16):
        level = _cpu().use_vectors(most)
        seen[level] = step(data, activation)
    assert 16 in seen
    for other in seen.values():
        assert all(map(same_bits, other, seen[16]))


@pytest.mark.usefixtures("_widest_vectors")
@pytest.mark.parametrize("most", [32, 16])
def test_halves_at_every_level_of_the_processor(most: int) -> None:
    assert _cpu().use_vectors(most) <= most
    test_every_half_value_passes_through()


def step(data: Data, activation: str | None) -> tuple[Tensor, ...]:
    y, mean, var, count, saved = launch.forward(*data.call(False), None, 1, EPS, activation, SLOPE)
    residual = data.r is not None
    gradients = launch.backward(
        data.dy, data.x, mean, var, count, data.weight, data.bias, kept(saved, data.r, activation), residual, None,
        EPS, activation, SLOPE,
    )  # fmt: skip
    return (y, mean, var, *gradients)


@pytest.mark.usefixtures("_restored_threads")
def test_several_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    datas = [Data((64, 33, 50), torch.float32, "contiguous", True) for _ in range(4)]
    alone = [step(data, "relu") for data in datas]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not all(map(same_bits, step(datas[index], "relu"), alone[index])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("_restored_threads")
def test_a_forked_child_computes_the_same_and_does_not_hang() -> None:
    # In the child PyTorch itself would hang in its next parallel loop: only our call, into memory that is there.
    torch.set_num_threads(2)
    x = torch.randn(64, 33, 50)
    mean, m2, _ = launch.moments(x, None, 1)
    found = torch.zeros(2, 33, dtype=torch.float64)
    arguments = (0, False, 64, 33, 50, x.data_ptr(), 0, found[0].data_ptr(), found[1].data_ptr())
    values = memoryview(found.numpy())
    expected = memoryview(torch.cat([mean, m2]).numpy())
    child = os.fork()
    if child == 0:
        launch._cpu.moments(*arguments)
        os._exit(0 if values.tobytes() == expected.tobytes() else 1)
    for _ in range(200):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended, "the child hung"
    assert status == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("skip", [False, True])
def test_one_call_moves_the_running_statistics(
    dtype: torch.dtype, momentum: float | None, skip: bool
) -> None:
    x = torch.randn(9, 4, 5)
    x[2, 1, 3] = float("nan")
    mine, other = (
        [torch.full((4,), 0.5, dtype=dtype), torch.ones(4, dtype=dtype), torch.tensor(6)] for _ in range(2)
    )
    versions = [value._version for value in mine]
    _, _, statistics = launch.train_forward(
        x, None, None, None, Running(*mine, momentum, skip), EPS, None, SLOPE
    )
    other[2] += 1
    count = torch.full((1, 1), 45.0, dtype=torch.float64)
    reference.update_running_(*other, statistics[:1], statistics[1:], count, momentum, skip)
    assert all(map(same_bits, mine, other))
    assert all(value._version > before for value, before in zip(mine, versions, strict=True))
    again = [torch.full((4,), 0.5, dtype=dtype), torch.ones(4, dtype=dtype), torch.tensor(7)]
    launch.update_running_(*again, statistics[:1], statistics[1:], count, momentum, skip)
    assert all(map(same_bits, again, other))


def test_every_half_value_passes_through() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        x = every.view(dtype).reshape(-1, 1)
        y, _ = launch.normalize(x, zero, one, None, None, None, None, None, 0.0)
        assert torch.equal(y.isnan(), x.isnan())
        assert same_bits(y[~x.isnan() & (x != 0)], x[~x.isnan() & (x != 0)])
        # Halves of every unit in the last place, both ways: rounded as PyTorch rounds.
        scale = torch.tensor([[1.0 / 3]], dtype=torch.float64)
        y, _ = launch.normalize(x, zero, scale, None, None, None, None, None, 0.0)
        expected = (x.float() * scale.float()).to(dtype)
        finite = expected.isfinite() & (x != 0)
        assert same_bits(y[finite], expected[finite])


@pytest.mark.parametrize(
    ("before", "after"), list(itertools.permutations([torch.float32, torch.bfloat16, torch.float64], 2))
)
def test_a_residual_of_another_dtype(before: torch.dtype, after: torch.dtype) -> None:
    data = Data((6, 4, 9), before, "contiguous", False)
    data.r = torch.randn(6, 4, 9).to(after)
    for activation in (None, "relu", "hardswish", "silu"):
        mine = step(data, activation)
        wide = reference.forward(*data.call(True), None, 1, EPS, activation, SLOPE)
        near(mine[0], wide[0], 2 * ROOM[before])
        assert mine[0].dtype == mine[3].dtype == mine[6].dtype == before


MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


@pytest.mark.slow
@pytest.mark.skipif(MEMORY < 12e9, reason="two tensors of 4 GB, and room for the rest")
def test_more_than_two_billion_elements() -> None:
    # A column of its own for what lies beyond 2³¹: an index of 32 bits would wrap.
    rows = 2**31 // 64 + 1000
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    x[-500:] = 1
    mean, m2, count = launch.moments(x, None, 1)
    assert count.item() == rows
    near(mean, torch.full((1, 64), 500 / rows, dtype=torch.float64), 1e-12)
    near(m2, torch.full((1, 64), 500 - 500**2 / rows, dtype=torch.float64), 1e-12)
    y, _ = launch.normalize(x, mean * 0, mean * 0 + 1, None, None, None, None, None, 0.0)
    assert (y[-500:] == 1).all()
    assert (y[-501:-500] == 0).all()

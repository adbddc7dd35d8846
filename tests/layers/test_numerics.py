"""How exact the reference and the CPU kernels are: measured against longdouble, held to what the package promises."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from helpers import EXACT, error, lay_out, leaf, moved, oracle, real, same_bits, ulps
from torch import Tensor

import batchnorm
from batchnorm.kernels import cpu

LAYOUTS = {"rows": (300, 4), "contiguous": (3, 4, 10, 10), "channels_last": (3, 4, 10, 10)}
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


BACKEND = "reference"


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    monkeypatch.setattr(request.module, "BACKEND", request.param)


def draw(layout: str) -> Tensor:
    return lay_out(
        torch.randn(LAYOUTS[layout], dtype=torch.float64), layout if layout != "rows" else "contiguous"
    )


def held(
    x: Tensor,
    dy: Tensor,
    bound: float,
    *,
    activation: str | None = None,
    eps: float = 1e-5,
) -> None:
    """Assert that a training step is within `bound` of the truth, and that its running statistics are exact."""
    channels = x.shape[1]
    weight, bias = (torch.rand(2, channels, dtype=torch.float64) + 0.5).to(x.dtype)
    expected = oracle(x, dy, weight=weight, bias=bias, activation=activation, eps=eps)
    n = expected.count
    unbiased = expected.var * n / (n - 1)
    start = (torch.zeros(channels), torch.ones(channels))
    running = (start[0].clone(), start[1].clone())
    leaves = [leaf(x), leaf(weight), leaf(bias)]
    call = {"activation": activation, "negative_slope": 0.2, "backend": BACKEND}
    y = batchnorm.batch_norm(leaves[0], *running, *leaves[1:], True, 0.3, eps, **call)
    results = (y, *torch.autograd.grad(y, leaves, dy))
    for name, result in zip(NAMES, results, strict=True):
        assert result.dtype == x.dtype
        assert error(result, getattr(expected, name)) <= bound, name
    assert ulps(running[0], moved(start[0], expected.mean, 0.3)) <= 2
    var = moved(start[1], unbiased, 0.3)
    if float(var.max()) < torch.finfo(torch.float32).max:
        assert ulps(running[1], var) <= 8
    else:
        assert running[1].isinf().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, -1e5, 1e7], ids=str)
def test_offsets(offset: float, layout: str) -> None:
    x = lay_out(((draw(layout) + offset) * 0.37).float(), layout if layout != "rows" else "contiguous")
    held(x, draw(layout).float(), EXACT[torch.float32])
    held(x, draw(layout).float(), EXACT[torch.float32], activation="leaky_relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0.0, 4e3, 1e6, 1e7], ids=str)
@pytest.mark.parametrize("gradient_offset", [1e3, -1e6], ids=str)
def test_gradient_offsets(gradient_offset: float, offset: float, layout: str) -> None:
    held((draw(layout) + offset).float(), (draw(layout) + gradient_offset).float(), EXACT[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-10, 1e10, 1e18, 1e25, 1e37], ids=str)
def test_magnitudes(magnitude: float, layout: str) -> None:
    held((draw(layout) * magnitude).float(), draw(layout).float(), EXACT[torch.float32])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_that_does_not_vary(layout: str) -> None:
    # Blocks of 128 rows or 16,384 positions, some of which are constant far from the rest, or far away as a whole.
    x = torch.randn(600, 3, *(() if layout == "rows" else (8, 9)))
    x[:300] = 50.0
    x[200:210, 1] += 3e4
    x = lay_out(x, layout if layout != "rows" else "contiguous")
    held(x, torch.randn_like(x), EXACT[torch.float32])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_channel_that_overflows_changes_no_other(layout: str, value: float) -> None:
    shape = (300, 5) if layout == "rows" else (12, 5, 6, 6)
    x, dy = torch.randn(shape) + 1, torch.randn(shape) + 2
    found = []
    for poisoned in (False, True):
        given = lay_out(x.clone(), layout if layout != "rows" else "contiguous")
        if poisoned:
            given[3, 2] = value
        a, weight, bias = leaf(given), leaf(torch.ones(5)), leaf(torch.zeros(5))
        running = (torch.zeros(5), torch.ones(5))
        y = batchnorm.batch_norm(a, *running, weight, bias, training=True, backend=BACKEND, activation="relu")
        gradients = torch.autograd.grad(y, [a, weight, bias], dy)
        found.append([y, gradients[0], gradients[1], gradients[2], *running])
    rest = [0, 1, 3, 4]
    for clean, other in zip(*found, strict=True):
        assert torch.equal(*((each[:, rest] if each.dim() > 1 else each[rest]) for each in (clean, other)))


def test_tiny_values_with_a_tiny_eps() -> None:
    # Here σ² is far below float32 and all of eps: the result is of order 1 only if σ² was not lost.
    held((draw("rows") * 1e-30).float(), draw("rows").float(), EXACT[torch.float32], eps=1e-60)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("offset", "bound"), [(0.0, 1e-14), (10.0, 1e-14), (1e3, 1e-12), (1e7, 1e-12)], ids=str
)
def test_float64(offset: float, bound: float, layout: str) -> None:
    held(draw(layout) + offset, draw(layout), bound)
    held(draw(layout) + offset, draw(layout), bound, activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0], ids=str)
def test_half_types(offset: float, dtype: torch.dtype, layout: str) -> None:
    x = ((draw(layout) + offset) * 2).to(dtype)
    held(x, draw(layout).to(dtype), EXACT[dtype])
    held(x, (draw(layout) + 50).to(dtype), EXACT[dtype], activation="relu")


def test_float16_range() -> None:
    # Sums and squares leave float16 and, at 300 values of 6e4, so would float32 sums of squares of less care.
    x = (draw("rows") * 1e4).clamp(-6.5e4, 6.5e4).half()
    held(x, draw("rows").half() * 100, EXACT[torch.float16])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("value", [100.1, -3e-5, 1e4], ids=str)
@pytest.mark.parametrize("rows", [2, 300, 1000])
def test_constant_channel_gives_exactly_the_bias(rows: int, value: float, dtype: torch.dtype) -> None:
    x = torch.full((rows, 2), value, dtype=torch.float64)
    x[:, 1] = torch.randn(rows)
    x = leaf(x.to(dtype))
    weight, bias = leaf(torch.tensor([3.3, 2]).to(dtype)), leaf(torch.tensor([0.7, -1]).to(dtype))
    running = (torch.zeros(2), torch.ones(2))
    for stats, training in (((None, None), True), (running, True)):
        y = batchnorm.batch_norm(x, *stats, weight, bias, training, backend=BACKEND)
        assert (y[:, 0] == bias[0]).all()
        dy = torch.randn(rows, 2).to(dtype)
        gradients = torch.autograd.grad(y, [x, weight], dy)
        assert gradients[1][0] == 0
        assert gradients[0].isfinite().all()
    assert running[1][0] == torch.tensor(0.9)
    assert ulps(running[0][:1], moved(torch.zeros(1), real(x[0, :1]), 0.1)) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eval_far_from_zero(dtype: torch.dtype) -> None:
    # y = a·x + b would cancel here.
    mean, var = torch.tensor([1e6, -2e6], dtype=dtype), torch.tensor([0.04, 3.0], dtype=dtype)
    x, dy = (torch.randn(50, 2) + mean).to(dtype), torch.randn(50, 2, dtype=dtype)
    weight, bias = torch.rand(2, 2, dtype=dtype) + 0.5
    a, w = leaf(x), leaf(weight)
    y = batchnorm.batch_norm(a, mean, var, w, bias, backend=BACKEND)
    expected = oracle(x, dy, weight=weight, bias=bias, running=(mean, var))
    gradients = torch.autograd.grad(y, [a, w], dy)
    assert error(y, expected.output) <= EXACT[dtype]
    assert error(gradients[0], expected.grad_input) <= EXACT[dtype]
    assert error(gradients[1], expected.grad_weight) <= EXACT[dtype]


def test_exact_normalization_uses_the_biased_and_running_var_the_unbiased_variance() -> None:
    x = torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64)  # variance 2 biased, 3 unbiased
    running = (torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    y = batchnorm.batch_norm(x, *running, training=True, momentum=1.0, eps=1e-30, backend=BACKEND)
    assert running[1].item() == pytest.approx(3, rel=1e-15)
    assert running[0].item() == pytest.approx(1, rel=1e-15)
    assert y[2].item() == pytest.approx(2**0.5, rel=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_ten_million_values(layout: str) -> None:
    x = torch.randn(10**7, 1) + 100
    dy = torch.randn(10**7, 1) + 3
    if layout == "planes":
        x, dy = x.reshape(10, 1, 10**6), dy.reshape(10, 1, 10**6)
    held(x, dy, EXACT[torch.float32])


def test_two_hundred_thousand_values() -> None:
    held(torch.randn(200_000, 1) + 100, torch.randn(200_000, 1) + 3, EXACT[torch.float32])


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("shape", [(70_001, 3), (5, 3, 150, 149)], ids=str)
def test_same_bits_for_any_threads_layout_and_from_run_to_run(shape: tuple[int, ...]) -> None:
    x, r, dy = (torch.randn(shape) * 3 + 40 for _ in range(3))
    mask = torch.rand(shape[0], *shape[2:]) < 0.8
    seen: list[tuple[Tensor, ...]] = []
    for threads, layout in itertools.chain(
        itertools.product([1, 2], ["contiguous", "channels_last"]), [(2, "sliced")]
    ):
        torch.set_num_threads(threads)
        a, b = leaf(lay_out(x, layout)), leaf(r)
        weight, bias = leaf(torch.full((3,), 1.3)), leaf(torch.full((3,), -0.2))
        running = (torch.zeros(3), torch.ones(3))
        y = batchnorm.batch_norm(
            a, *running, weight, bias, True, activation="relu", residual=b, mask=mask, backend="reference"
        )
        # A float32 result hides what a sum in float64 differs by: its own bits count, too.
        sums = torch.ops.batchnorm.moments(a.detach(), mask, 1, "reference")
        seen.append((y, *torch.autograd.grad(y, [a, b, weight, bias], dy), *running, *sums))
    for other in seen[1:]:
        for mine, first in zip(other, seen[0], strict=True):
            assert same_bits(mine, first)

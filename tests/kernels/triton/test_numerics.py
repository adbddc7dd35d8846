"""How exact the Triton kernels are, through the layer's function: offsets, constant channels, magnitudes, weights."""

from typing import Any

import pytest
import torch
from helpers import EXACT, error, lay_out, leaf, moved, oracle, ulps
from torch import Tensor
from triton_helpers import DEVICE, marks

import batchnorm

pytestmark = marks  # with pytest.mark.gpu where there is a GPU

BOUND = {**EXACT, torch.float32: 1e-6, torch.float64: 1e-12}
if DEVICE == "cpu":
    BOUND[torch.bfloat16] *= 2  # the interpreter cuts bfloat16 off where a GPU rounds
slow = () if DEVICE == "cuda" else pytest.mark.slow
LAYOUTS = ["contiguous", pytest.param("channels_last", marks=slow), pytest.param("rows", marks=slow)]
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")
SHAPE = {"rows": (90, 3), "contiguous": (3, 3, 6, 5), "channels_last": (3, 3, 6, 5)}


def draw(layout: str) -> Tensor:
    return lay_out(
        torch.randn(SHAPE[layout], dtype=torch.float64), "contiguous" if layout == "rows" else layout
    )


def held(x: Tensor, dy: Tensor, eps: float = 1e-5, mask: Tensor | None = None, **options: Any) -> None:
    """Assert that a training step is as near to the truth as is promised, and so are its running statistics."""
    channels = x.shape[1]
    weight, bias = (torch.rand(2, channels, dtype=torch.float64) + 0.5).to(x.dtype)
    truth = oracle(x, dy, weight=weight, bias=bias, eps=eps, mask=mask, **options)
    running = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    leaves = [leaf(t.to(DEVICE)) for t in (x, weight, bias)]
    there = None if mask is None else mask.to(DEVICE)
    call = {"mask": there, "negative_slope": 0.2, "backend": "triton", **options}
    y = batchnorm.batch_norm(leaves[0], *running, *leaves[1:], True, 0.3, eps, **call)
    results = (y, *torch.autograd.grad(y, leaves, dy.to(DEVICE)))
    for name, result in zip(NAMES, results, strict=True):
        assert result.dtype == x.dtype
        assert error(result, getattr(truth, name)) <= BOUND[x.dtype], name
    # The mean is a sum of float32: exact to σ, not to itself.
    near = moved(torch.zeros(channels), truth.mean, 0.3)
    spread = float(truth.var.max()) ** 0.5
    assert abs(running[0].double().cpu().numpy() - near).max() <= 1e-7 * spread + 2**-23 * abs(near).max()
    var = moved(torch.ones(channels), truth.var * truth.count / (truth.count - 1), 0.3)
    finite = (var < torch.finfo(torch.float32).max).astype(bool)
    assert running[1].cpu().isfinite().tolist() == finite.tolist()
    if finite.any():
        assert ulps(running[1].cpu()[torch.from_numpy(finite)], var[finite]) <= 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [10.0, -1e5, 1e7], ids=str)
def test_offsets(offset: float, layout: str) -> None:
    held(((draw(layout) + offset) * 0.37).float(), draw(layout).float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
def test_offsets_of_input_and_gradient(masked: bool, layout: str) -> None:
    mask = None
    if masked:
        mask = torch.rand(SHAPE[layout][0], *SHAPE[layout][2:]) < 0.7
        mask[0] = True
    held((draw(layout) + 1e6).float(), (draw(layout) - 1e6).float(), mask=mask)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "magnitude", [1e-38, pytest.param(1e-10, marks=slow), pytest.param(1e18, marks=slow), 1e25, 1e37], ids=str
)
def test_magnitudes(magnitude: float, layout: str) -> None:
    held((draw(layout) * magnitude).float(), draw(layout).float())


def test_magnitudes_that_differ_between_channels_and_a_mask() -> None:
    scale = torch.tensor([1e-3, 1e37, 1.0]).view(1, 3, 1, 1)
    for layout in ("contiguous", "channels_last"):
        x = (draw(layout) * scale).float()
        held(x, draw(layout).float() / scale.float(), mask=torch.rand(3, 6, 5) < 0.8)


def test_tiny_values_with_a_tiny_eps() -> None:
    # σ² is far below float32 and all of eps: the result is of order 1 only if σ² was not lost.
    held((draw("rows") * 1e-30).float(), draw("rows").float(), eps=1e-60)


def test_the_first_sample_is_nothing_like_the_others() -> None:
    # A pilot from the beginning of the batch alone would be 100 σ off: a sum about it cancels.
    for layout in ("contiguous", "channels_last"):
        x = (draw(layout) + 100).float()
        x[: x.shape[0] // 3] = 0
        held(x, draw(layout).float())


def test_an_outlier_stands_first() -> None:
    for layout in ("rows", "contiguous"):
        x = draw(layout).float()
        x[0] += 1e4
        held(x, draw(layout).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    offset = 1e3 if dtype == torch.float64 else 100
    for layout in ("contiguous", "channels_last"):
        held(((draw(layout) + offset) * 2).to(dtype), draw(layout).to(dtype), activation="leaky_relu")


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("value", [100.1, -3e-5], ids=str)
def test_a_constant_channel_gives_exactly_the_bias(value: float, dtype: torch.dtype) -> None:
    x = torch.full((40, 2), value, dtype=torch.float64)
    x[:, 1] = torch.randn(40)
    x = leaf(x.to(DEVICE, dtype))
    weight, bias = (leaf(torch.tensor(pair).to(DEVICE, dtype)) for pair in ([3.3, 2.0], [0.7, -1.0]))
    running = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    for statistics, training in (((None, None), True), (running, True)):
        y = batchnorm.batch_norm(x, *statistics, weight, bias, training, backend="triton")
        assert (y[:, 0] == bias[0]).all()
        gradients = torch.autograd.grad(y, [x, weight], torch.randn(40, 2).to(DEVICE, dtype))
        assert gradients[1][0] == 0
        assert gradients[0].isfinite().all()
    assert running[1][0].item() == pytest.approx(0.9, rel=1e-7)


def test_a_constant_gradient_gives_no_gradient_of_the_input() -> None:
    x = leaf(torch.randn(60, 3).to(DEVICE))
    y = batchnorm.batch_norm(x, None, None, training=True, backend="triton")
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 100.1))
    assert dx.abs().max() == 0


def test_eval_far_from_zero() -> None:
    # y = a·x + b would cancel here.
    mean, var = torch.tensor([1e6, -2e6]), torch.tensor([0.04, 3.0])
    x, dy = torch.randn(50, 2) + mean, torch.randn(50, 2)
    weight, bias = torch.rand(2, 2) + 0.5
    a, w = leaf(x.to(DEVICE)), leaf(weight.to(DEVICE))
    y = batchnorm.batch_norm(a, mean.to(DEVICE), var.to(DEVICE), w, bias.to(DEVICE), backend="triton")
    truth = oracle(x, dy, weight=weight, bias=bias, running=(mean, var))
    gradients = torch.autograd.grad(y, [a, w], dy.to(DEVICE))
    assert error(y, truth.output) <= 1e-6
    assert error(gradients[0], truth.grad_input) <= 1e-6
    assert error(gradients[1], truth.grad_weight) <= 1e-6

"""The layers against torch.nn's: what a plain layer computes, keeps and says."""

from typing import Any

import pytest
import torch
from helpers import EXACT, error, lay_out, leaf, oracle
from torch import Tensor, nn

import batchnorm

OURS = {
    2: batchnorm.BatchNorm1d,
    3: batchnorm.BatchNorm1d,
    4: batchnorm.BatchNorm2d,
    5: batchnorm.BatchNorm3d,
}
TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [None, "aten", "reference"]
SHAPES = [
    (7, 3),
    (5, 1),
    (5, 3, 9),
    (1, 2, 6),
    (5, 1, 1),
    (3, 5, 4, 7),
    (1, 3, 5, 5),
    (5, 9, 1, 1),
    (2, 3, 3, 1, 5),
]
LAYOUTS = ["contiguous", "channels_last", "sliced"]
# An expanded batch repeats one sample, so the sample itself must vary, and there must be a second one.
CASES = [(shape, layout) for shape in SHAPES for layout in LAYOUTS]
CASES += [(shape, "expanded") for shape in SHAPES if shape[0] > 1 and torch.Size(shape[2:]).numel() > 1]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps": 0.1},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"momentum": 0.37},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "eps": 1e-3},
    {"bias": False, "momentum": None, "track_running_stats": False},
    {"dtype": torch.float64},
]


def pair(dimensions: int, channels: int, backend: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Our layer and torch's, with the same random parameters and buffers."""
    torchs = TORCHS[dimensions](channels, **options)
    with torch.no_grad():
        for value in torchs.parameters():
            value.copy_(torch.randn(channels))
        if torchs.running_mean is not None:
            torchs.running_mean.copy_(torch.randn(channels))
            torchs.running_var.copy_(torch.rand(channels) + 0.5)
    ours = OURS[dimensions](channels, backend=backend, **options)
    ours.load_state_dict(torchs.state_dict(), strict=True)
    return ours, torchs


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    x = leaf(x)
    parameters = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return {"output": y, "grad_input": gradients[0]} | dict(zip(parameters, gradients[1:], strict=True))


def assert_alike(ours: Tensor, torchs: Tensor, name: str) -> None:
    """As near as two results of this dtype are that were summed in different orders."""
    assert (ours.dtype, ours.shape, ours.device) == (torchs.dtype, torchs.shape, torchs.device), name
    if not torchs.is_floating_point():
        assert torch.equal(ours, torchs), name
        return
    eps = torch.finfo(torchs.dtype).eps
    scale = torchs.double().abs().max().item() if torchs.numel() else 0.0
    torch.testing.assert_close(ours, torchs, rtol=8 * eps, atol=8 * eps * scale, equal_nan=True)


def assert_same_state(ours: nn.Module, torchs: nn.Module) -> None:
    mine, other = ours.state_dict(), torchs.state_dict()
    assert list(mine) == list(other)
    for name, value in other.items():
        assert_alike(mine[name], value, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_results_are_as_near_the_truth_as_torchs(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, training: bool, backend: str | None
) -> None:
    ours, torchs = pair(len(shape), shape[1], backend, dtype=dtype)
    ours.train(training)
    torchs.train(training)
    x = lay_out((torch.randn(shape) * 2 + 1).to(dtype), layout)
    dy = lay_out(torch.randn(shape).to(dtype), "sliced" if layout == "expanded" else layout)
    running = None if training else (torchs.running_mean.clone(), torchs.running_var.clone())
    mine, other = step(ours, x, dy), step(torchs, x, dy)
    expected = oracle(x, dy, weight=ours.weight, bias=ours.bias, running=running)
    for name, truth in (
        ("output", expected.output),
        ("grad_input", expected.grad_input),
        ("weight", expected.grad_weight),
        ("bias", expected.grad_bias),
    ):
        assert (mine[name].dtype, mine[name].shape) == (dtype, other[name].shape)
        allowed = (
            EXACT[dtype] if backend == "reference" else max(EXACT[dtype], 1.5 * error(other[name], truth))
        )
        assert error(mine[name], truth) <= allowed, name
    assert_same_state(ours, torchs)
    assert ours.num_batches_tracked.item() == int(training)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_options_over_several_steps(dimensions: int, options: dict[str, Any], backend: str | None) -> None:
    shape = (4, 3, 2, 5, 3)[:dimensions]
    ours, torchs = pair(dimensions, 3, backend, **options)
    dtype = options.get("dtype", torch.float32)
    for training in (True, True, False, True, False):
        ours.train(training)
        torchs.train(training)
        x, dy = (torch.randn(shape, dtype=dtype) * 3 - 2 for _ in range(2))
        mine, other = step(ours, x, dy), step(torchs, x, dy)
        assert list(mine) == list(other)
        for name, value in other.items():
            scale = value.abs().max().item()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(mine[name], value, rtol=16 * eps, atol=16 * eps * scale)
        assert_same_state(ours, torchs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_input_with_float32_parameters(dtype: torch.dtype, training: bool, backend: str | None) -> None:
    ours, torchs = pair(4, 5, backend)
    ours.train(training)
    torchs.train(training)
    x, dy = ((torch.randn(4, 5, 3, 7) * 2 + 3).to(dtype) for _ in range(2))
    expected = oracle(
        x, dy, weight=ours.weight, bias=ours.bias,
        running=None if training else (ours.running_mean.clone(), ours.running_var.clone()),
    )  # fmt: skip
    mine, other = step(ours, x, dy), step(torchs, x, dy)
    assert {name: value.dtype for name, value in mine.items()} == {
        name: value.dtype for name, value in other.items()
    }
    assert error(mine["output"], expected.output) <= max(
        EXACT[dtype], 1.5 * error(other["output"], expected.output)
    )
    assert error(mine["weight"], expected.grad_weight) <= max(
        3e-7, 1.5 * error(other["weight"], expected.grad_weight)
    )
    if backend == "reference":  # the statistics are as good as in float32
        assert error(mine["output"], expected.output) <= EXACT[dtype]
        assert error(mine["grad_input"], expected.grad_input) <= EXACT[dtype]
        assert error(mine["weight"], expected.grad_weight) <= 3e-7
        assert error(mine["bias"], expected.grad_bias) <= 3e-7
    assert_same_state(ours, torchs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 5), (4, 3, 0), (4, 3, 0, 2)], ids=str)
def test_empty_batch(shape: tuple[int, ...], training: bool, backend: str | None) -> None:
    ours, torchs = pair(len(shape), 3, backend)
    ours.train(training)
    torchs.train(training)
    x = torch.zeros(shape)
    mine, other = step(ours, x, x), step(torchs, x, x)
    for name, value in other.items():
        assert_alike(mine[name], value, name)
    assert_same_state(ours, torchs)
    assert ours.num_batches_tracked.item() == int(training)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_function_is_torchs_function(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 4, dtype=dtype)
    running = [torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)]
    copies = [value.clone() for value in running]
    weight, bias = torch.randn(2, 3, dtype=dtype)
    for training in (True, False):
        arguments = (weight, bias, training, 0.3, 1e-3)
        mine = batchnorm.batch_norm(x, *running, *arguments)
        assert_alike(mine, nn.functional.batch_norm(x, *copies, *arguments), "output")
    for mine, other in zip(running, copies, strict=True):
        assert_alike(mine, other, "running")


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_wanted(backend: str | None) -> None:
    ours, _ = pair(3, 3, backend)
    x, dy = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    everything = step(ours, x, dy)
    for wanted in (["weight"], ["bias"], ["weight", "bias"], []):
        for name, parameter in ours.named_parameters():
            parameter.requires_grad_(name in wanted)
        y = ours(x if wanted else leaf(x))
        assert y.requires_grad
        if wanted:
            got = torch.autograd.grad(y, [getattr(ours, name) for name in wanted], dy)
            for name, value in zip(wanted, got, strict=True):
                torch.testing.assert_close(value, everything[name])
    assert not ours(x).requires_grad
    with torch.no_grad():
        assert not ours(leaf(x)).requires_grad


def test_fully_frozen_eval_layer_still_passes_gradients() -> None:
    ours, torchs = pair(4, 3, "reference")
    ours.eval().requires_grad_(False)
    torchs.eval().requires_grad_(False)
    x, dy = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert_alike(step(ours, x, dy)["grad_input"], step(torchs, x, dy)["grad_input"], "grad_input")

"""A mask is the same as having only the valid entries."""

from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, error, leaf, oracle, same_bits
from torch import Tensor

import batchnorm

NAN = float("nan")


def compressed(x: Tensor, valid: Tensor) -> Tensor:
    """The valid entries of (N, C, *S) as rows (M, C)."""
    return x.movedim(1, -1)[valid]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_equals_the_compressed_entries_with_nan_under_zero(
    with_residual: bool, activation: str | None, training: bool
) -> None:
    valid = torch.rand(5, 7) < 0.6
    valid[2] = False
    hole = ~valid.unsqueeze(1).expand(5, 3, 7)
    x, r, dy = (torch.randn(5, 3, 7, dtype=torch.float64).masked_fill(hole, NAN) for _ in range(3))
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    results = []
    for compress in (False, True):
        layer = batchnorm.BatchNorm1d(3, activation=activation, backend="reference", dtype=torch.float64)
        layer.load_state_dict(layer.state_dict() | {"weight": weight, "bias": bias})
        layer.train(training)
        a, b, g = (leaf(compressed(t, valid) if compress else t) for t in (x, r, dy))
        y = layer(a, b if with_residual else None, mask=None if compress else valid)
        wanted = [a, layer.weight, layer.bias, *([b] if with_residual else [])]
        gradients = torch.autograd.grad(y, wanted, g.detach())
        results.append((y, gradients, layer.running_mean, layer.running_var, layer.num_batches_tracked))
    (y, gradients, *buffers), (expected_y, expected_gradients, *expected_buffers) = results
    torch.testing.assert_close(compressed(y, valid), expected_y, rtol=1e-12, atol=1e-13)
    assert (y[hole] == 0).all()
    for mine, other in zip(gradients, expected_gradients, strict=True):
        if mine.dim() == 3:
            assert (mine[hole] == 0).all()
            mine = compressed(mine, valid)
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    for mine, other in zip(buffers, expected_buffers, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 1), (1, 6), (6,), (1, 1), (), (4, 6)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_broadcasts_like_any_tensor(shape: tuple[int, ...], training: bool) -> None:
    mask = (torch.arange(torch.Size(shape).numel()) % 3 != 1).reshape(shape)
    x = torch.randn(4, 3, 6)
    running = (torch.zeros(3), torch.ones(3))
    whole = mask.expand(4, 6).clone()
    y = batchnorm.batch_norm(x, *running, training=training, mask=mask, backend="reference")
    other = (torch.zeros(3), torch.ones(3))
    assert same_bits(y, batchnorm.batch_norm(x, *other, training=training, mask=whole, backend="reference"))
    assert same_bits(running[1], other[1])
    assert ((y == 0) == ~whole.unsqueeze(1)).all()


def test_two_axes_of_positions() -> None:
    x, mask = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.rand(5, 1) < 0.7
    y = batchnorm.batch_norm(x, None, None, training=True, mask=mask, backend="reference")
    rows = mask[:, 0]
    expected = torch.nn.functional.batch_norm(x[:, :, rows], None, None, training=True)
    torch.testing.assert_close(y[:, :, rows], expected)
    assert (y[:, :, ~rows] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.uint8], ids=str)
def test_integer_weights_are_repeated_samples(dtype: torch.dtype) -> None:
    weights = torch.tensor([0, 3, 1, 2, 0, 1])
    x, r, dy = torch.randn(3, 6, 4, dtype=torch.float64)
    index = torch.repeat_interleave(torch.arange(6), weights)
    first = torch.zeros(len(index), 1, dtype=torch.float64)  # the repeats of a sample share its gradient
    first[[0, 3, 4, 6]] = 1
    results = []
    for repeated in (False, True):
        layer = batchnorm.BatchNorm1d(4, activation="silu", backend="reference", dtype=torch.float64)
        a, b = leaf(x), leaf(r)
        if repeated:
            y, gradient = layer(a[index], b[index]), dy[index] * first
        else:
            y, gradient = layer(a, b, weights.to(dtype)), dy
        gradients = torch.autograd.grad(y, [a, b, layer.weight, layer.bias], gradient)
        y = y if repeated else y[index]
        results.append((y, *gradients, layer.running_mean, layer.running_var))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_fractional_weights_against_the_oracle() -> None:
    x, dy = torch.randn(5, 3, 4) * 3 + 1, torch.randn(5, 3, 4)
    mask = torch.rand(5, 4) * (torch.rand(5, 4) < 0.7)
    weight = leaf(torch.randn(3))
    running = (torch.zeros(3), torch.ones(3))
    a = leaf(x)
    y = batchnorm.batch_norm(
        a, *running, weight, training=True, activation="leaky_relu", negative_slope=0.2, mask=mask
    )
    expected = oracle(x, dy, weight=weight, activation="leaky_relu", mask=mask)
    gradients = torch.autograd.grad(y, [a, weight], dy)
    assert error(y, expected.output) < 3e-7
    assert error(gradients[0], expected.grad_input) < 3e-7
    assert error(gradients[1], expected.grad_weight) < 3e-7
    n = expected.count
    assert error(running[0], 0.1 * expected.mean) < 3e-7
    assert error(running[1], 0.9 + 0.1 * expected.var * n / (n - 1)) < 3e-7


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_nothing_valid_gives_zeros_and_leaves_statistics_alone(
    activation: str | None, training: bool, backend: str | None
) -> None:
    layer = batchnorm.BatchNorm1d(3, activation=activation, backend=backend).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x, r = leaf(torch.full((4, 3, 5), NAN)), leaf(torch.randn(4, 3, 5))
    y = layer(x, r, torch.zeros(4, 5, dtype=torch.bool))
    gradients = torch.autograd.grad(y, [x, r, *layer.parameters()], torch.full_like(y, NAN))
    for value in (y, *gradients):
        assert (value == 0).all()
    for name in ("running_mean", "running_var"):
        assert same_bits(layer.state_dict()[name], before[name]), name
    assert layer.num_batches_tracked.item() == int(training)


@pytest.mark.parametrize("mask", [torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0.5, 0, 0])], ids=str)
def test_count_of_one_or_less_leaves_running_var_alone(mask: Tensor) -> None:
    layer = batchnorm.BatchNorm1d(3)
    x = torch.randn(4, 3)
    y = layer(x, mask=mask)
    torch.testing.assert_close(y, torch.zeros(4, 3))  # a single value is its own mean, and the bias is 0
    assert layer.running_var.tolist() == [1, 1, 1]
    torch.testing.assert_close(layer.running_mean, 0.1 * x[1])


def test_all_valid_is_no_mask() -> None:
    x, dy = torch.randn(2, 6, 3, 4)
    results = []
    options: dict[str, Any] = {"activation": "relu", "backend": "reference"}
    for mask in (None, torch.ones(4, dtype=torch.bool), torch.ones(6, 4)):
        layer = batchnorm.BatchNorm1d(3, **options)
        a = leaf(x)
        y = layer(a, mask=mask)
        y.backward(dy)
        results.append((y, a.grad, layer.weight.grad, layer.running_mean, layer.running_var))
    for other in results[1:]:
        for mine, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eval_with_nan_under_zero_and_a_residual(dtype: torch.dtype, backend: str | None) -> None:
    layer = batchnorm.BatchNorm1d(3, activation="gelu", backend=backend, dtype=dtype).eval()
    valid = torch.tensor([True, False, True, False])
    x, r = leaf(torch.randn(4, 3).to(dtype)), leaf(torch.randn(4, 3).to(dtype))
    with torch.no_grad():
        x[1], r[3] = NAN, NAN
    y = layer(x, r, valid)
    dy = torch.randn(4, 3).to(dtype)
    dy[1] = NAN
    gradients = torch.autograd.grad(y, [x, r, *layer.parameters()], dy)
    for value in (y, *gradients):
        assert value.isfinite().all()
    for value in (y, *gradients[:2]):
        assert (value[~valid] == 0).all()
        assert (value[valid] != 0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_differentiable_gradients_are_the_gradients(activation: str | None, training: bool) -> None:
    # With create_graph another formula runs; what stands under a 0 must not reach it either.
    valid = torch.rand(4, 5) < 0.7
    hole = ~valid.unsqueeze(1).expand(4, 3, 5)
    x, r, dy = (torch.randn(4, 3, 5, dtype=torch.float64).masked_fill(hole, NAN) for _ in range(3))
    layer = batchnorm.BatchNorm1d(3, activation=activation, backend="reference", dtype=torch.float64)
    layer.train(training)
    a, b = leaf(x), leaf(r)
    wanted = [a, b, layer.weight, layer.bias]
    y = layer(a, b, valid)
    plain = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    graphed = torch.autograd.grad(y, wanted, dy, create_graph=True)
    for mine, other in zip(graphed, plain, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(mine.detach(), other, rtol=1e-12, atol=1e-12)
    second = torch.autograd.grad(sum((value**2).sum() for value in graphed), layer.weight)
    assert second[0].isfinite().all()

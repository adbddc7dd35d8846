"""Any shape, any mask, any options; and what must not change when the batch is shifted, scaled or reordered."""

from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, lay_out, leaf, oracle, real, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm

# Every size has its own way to go wrong: 1, odd ones, and those beyond a vector register.
SIZES = st.sampled_from([1, 2, 3, 5, 8, 17])
SHAPES = st.builds(
    lambda samples, channels, positions: (samples, channels, *positions),
    SIZES,
    st.sampled_from([1, 2, 3, 9, 33]),
    st.lists(st.sampled_from([1, 2, 3, 7]), max_size=3),
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    shape=SHAPES,
    layout=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    masked=st.booleans(),
    training=st.booleans(),
    affine=st.sampled_from(["both", "weight", "bias", "none"]),
    seed=st.integers(0, 2**16),
)
def test_any_call_against_the_oracle(
    shape: tuple[int, ...], layout: str, activation: str | None, residual: bool, masked: bool, training: bool,
    affine: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    channels = shape[1]
    x, dy = (lay_out(torch.randn(shape, dtype=torch.float64) * 2 + 1, layout) for _ in range(2))
    r = lay_out(torch.randn(shape, dtype=torch.float64), layout) if residual else None
    mask = torch.rand(shape[0], *shape[2:]) < 0.8 if masked else None
    weight = torch.randn(channels, dtype=torch.float64) if affine in ("both", "weight") else None
    bias = torch.randn(channels, dtype=torch.float64) if affine in ("both", "bias") else None
    running = (torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64) + 0.5)
    valid = shape[0] * torch.Size(shape[2:]).numel() if mask is None else int(mask.sum())
    values = {"x": leaf(x), "weight": leaf(weight), "bias": leaf(bias), "residual": leaf(r)}
    arguments: dict[str, Any] = {"training": training, "residual": values["residual"], "mask": mask}
    arguments |= {"activation": activation, "negative_slope": 0.2, "eps": 0.1}

    def call() -> Tensor:
        stats = (None, None) if training else running
        return batchnorm.batch_norm(
            values["x"], *stats, values["weight"], values["bias"], **arguments, backend="reference"
        )

    if training and mask is None and x.numel() == channels:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            call()
        return
    y = call()
    assert y.shape == x.shape
    wanted = {name: value for name, value in values.items() if value is not None}
    gradients = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))
    if training and valid == 0:
        assert (y == 0).all()
        return
    expected = oracle(
        x, dy, weight=weight, bias=bias, residual=r, mask=mask, activation=activation, eps=0.1,
        running=None if training else running,
    )  # fmt: skip
    truth = {
        "x": expected.grad_input,
        "weight": expected.grad_weight,
        "bias": expected.grad_bias,
        "residual": expected.grad_residual,
    }
    scale = float(abs(expected.grad_residual).max()) + 1  # two values a channel leave a dx of rounding errors
    assert abs(real(y) - expected.output).max() <= 1e-13 * (1 + float(abs(expected.output).max()))
    for name, gradient in gradients.items():
        assert abs(real(gradient) - truth[name]).max() <= 1e-12 * scale, name


@settings(max_examples=25, derandomize=True, deadline=None)
@given(shape=SHAPES, training=st.booleans(), seed=st.integers(0, 2**16))
def test_any_shape_is_torchs(shape: tuple[int, ...], training: bool, seed: int) -> None:
    torch.manual_seed(seed)
    rank = len(shape)
    ours = {
        2: batchnorm.BatchNorm1d,
        3: batchnorm.BatchNorm1d,
        4: batchnorm.BatchNorm2d,
        5: batchnorm.BatchNorm3d,
    }
    torchs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    results: list[Any] = []
    x = torch.randn(shape)
    for kind in (ours, torchs):
        layer = kind[rank](shape[1], eps=0.1).train(training)
        try:
            results.append((layer(x), layer.running_mean, layer.running_var, layer.num_batches_tracked))
        except ValueError as error:
            results.append(type(error))
    if isinstance(results[1], type):
        assert issubclass(results[0], results[1])
        return
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def whole(x: Tensor, dy: Tensor, backend: str | None, **options: Any) -> tuple[Tensor, ...]:
    a, weight, bias = (
        leaf(x),
        leaf(torch.tensor([1.5, -0.5, 2.0]).to(x)),
        leaf(torch.tensor([0.3, 0.1, -1.0]).to(x)),
    )
    y = batchnorm.batch_norm(a, None, None, weight, bias, True, backend=backend, **options)
    return (y.detach(), *torch.autograd.grad(y, [a, weight, bias], dy))


BACKENDS = [None, "reference"]
OPTIONS = [{}, {"activation": "relu"}, {"activation": "gelu"}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shift_changes_nothing(options: dict[str, Any], backend: str | None) -> None:
    x, dy = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    shift = torch.tensor([3.0, -70.0, 1e3], dtype=torch.float64).reshape(3, 1)
    for mine, other in zip(
        whole(x + shift, dy, backend, **options), whole(x, dy, backend, **options), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("factor", [4.0, 0.25, 1024.0])
def test_scale_divides_the_gradient(factor: float, options: dict[str, Any], backend: str | None) -> None:
    x, dy = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    plain = whole(x, dy, backend, eps=1e-5, **options)
    scaled = whole(x * factor, dy, backend, eps=1e-5 * factor**2, **options)
    for mine, other in zip((scaled[0], scaled[1] * factor, *scaled[2:]), plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_normal_and_follows_the_sign_of_the_input(backend: str | None) -> None:
    x = torch.randn(6, 3, 5, dtype=torch.float64) * 3 + 2
    plain = batchnorm.batch_norm(x, None, None, training=True, backend=backend)
    flipped = batchnorm.batch_norm(-x, None, None, training=True, backend=backend)
    torch.testing.assert_close(flipped, -plain, rtol=1e-13, atol=1e-13)
    mean, var = plain.mean((0, 2)), plain.var((0, 2), unbiased=False)
    torch.testing.assert_close(mean, torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, torch.ones(3).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_order_of_the_batch_and_of_the_channels_goes_through(
    options: dict[str, Any], backend: str | None
) -> None:
    x, dy = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    plain = whole(x, dy, backend, **options)
    order, places = torch.randperm(6), torch.randperm(5)
    moved = whole(x[order][:, :, places], dy[order][:, :, places], backend, **options)
    for mine, other in zip(moved[:2], plain[:2], strict=True):
        torch.testing.assert_close(mine, other[order][:, :, places], rtol=1e-12, atol=1e-12)
    for mine, other in zip(moved[2:], plain[2:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    alone = batchnorm.batch_norm(x[:, [2, 0]], None, None, training=True, backend=backend, **options)
    together = batchnorm.batch_norm(x, None, None, training=True, backend=backend, **options)
    torch.testing.assert_close(alone, together[:, [2, 0]], rtol=1e-12, atol=1e-12)


def test_gradient_is_orthogonal_to_a_constant_and_to_the_normalized_input() -> None:
    x, dy = torch.randn(2, 50, 3)
    a = leaf(x)
    y = batchnorm.batch_norm(a, None, None, training=True, eps=1e-12, backend="reference")
    (dx,) = torch.autograd.grad(y, a, dy)
    assert dx.abs().max() > 0.1
    torch.testing.assert_close(dx.sum(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close((dx * y.detach()).sum(0), torch.zeros(3), rtol=0, atol=1e-4)


def test_positions_are_samples() -> None:
    x, dy = torch.randn(2, 6, 3, 4, 5)
    spread = whole(x, dy, "reference")
    flat = whole(x.flatten(2), dy.flatten(2), "reference")
    rows = whole(x.movedim(1, -1).reshape(-1, 3), dy.movedim(1, -1).reshape(-1, 3), "reference")
    for mine, other, third in zip(spread, flat, rows, strict=True):
        assert same_bits(mine.flatten(2) if mine.dim() == 4 else mine, other)
        torch.testing.assert_close(mine.movedim(1, -1).reshape(-1, 3) if mine.dim() == 4 else mine, third)

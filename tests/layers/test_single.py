"""`single=`: what training does with one value per channel."""

import pytest
import torch
from helpers import same_bits
from torch import nn

import batchnorm

LAYERS = [
    (batchnorm.BatchNorm1d, (1, 3)),
    (batchnorm.BatchNorm1d, (1, 3, 1)),
    (batchnorm.BatchNorm2d, (1, 3, 1, 1)),
    (batchnorm.BatchNorm3d, (1, 3, 1, 1, 1)),
]


def made(cls: type[nn.Module], **options: object) -> nn.Module:
    layer = cls(3, **options)
    with torch.no_grad():
        layer.weight.uniform_(1, 2)
        layer.bias.uniform_(-1, 1)
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(1, 2)
    return layer


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
def test_error_is_the_default_and_pytorchs(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        cls(3)(torch.randn(shape))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        cls(3, single="error")(torch.randn(shape))


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
def test_running_is_eval_for_this_batch(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer = made(cls, single="running", activation="relu")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x, r, dy = torch.randn(3, *shape)
    given = x.clone().requires_grad_()
    y = layer(given, r)
    y.backward(dy)
    other = x.clone().requires_grad_()
    layer.eval()
    wanted = layer(other, r)
    wanted.backward(dy)
    assert same_bits(y, wanted)
    assert same_bits(given.grad, other.grad)
    for name, value in layer.state_dict().items():
        assert same_bits(value, before[name])


def test_running_without_running_statistics_is_an_error() -> None:
    layer = batchnorm.BatchNorm1d(3, track_running_stats=False, single="running")
    with pytest.raises(batchnorm.InputError, match="track_running_stats=True"):
        layer(torch.randn(1, 3))


@pytest.mark.parametrize(("cls", "shape"), LAYERS)
def test_zero_takes_the_variance_for_zero(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer = made(cls, single="zero", momentum=0.25)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    x = (torch.randn(shape) * 1e6).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(shape))
    assert torch.equal(y.flatten(), layer.bias)
    assert not x.grad.any()
    assert not layer.weight.grad.any()
    assert same_bits(layer.running_var, var)
    torch.testing.assert_close(layer.running_mean, mean * 0.75 + x.detach().flatten() * 0.25)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("single", ["running", "zero"])
def test_more_than_one_value_is_batch_norm(single: str) -> None:
    a, b = made(batchnorm.BatchNorm1d, single=single), batchnorm.BatchNorm1d(3)
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3)
    assert same_bits(a(x), b(x))
    assert same_bits(a.running_var, b.running_var)


def test_the_function_takes_it_too() -> None:
    x = torch.randn(1, 3)
    mean, var = torch.randn(3), torch.rand(3) + 1
    y = batchnorm.batch_norm(x, mean, var, training=True, single="running")
    assert same_bits(y, batchnorm.batch_norm(x, mean, var))
    y = batchnorm.batch_norm(x, None, None, training=True, single="zero")
    assert not y.any()
    with pytest.raises(batchnorm.InputError, match="'error', 'running', 'zero'"):
        batchnorm.batch_norm(x, mean, var, training=True, single="nothing")  # type: ignore[arg-type]


def test_wrong_names_and_the_text() -> None:
    with pytest.raises(batchnorm.InputError, match="single"):
        batchnorm.BatchNorm1d(3, single="none")  # type: ignore[arg-type]
    with pytest.raises(batchnorm.InputError, match="single"):
        batchnorm.LazyBatchNorm1d(single="none")  # type: ignore[arg-type]
    assert "single=running" in repr(batchnorm.BatchNorm1d(3, single="running"))
    lazy = batchnorm.LazyBatchNorm1d(single="zero")
    assert lazy(torch.randn(1, 3)).shape == (1, 3)

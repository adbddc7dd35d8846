"""`inplace=True`: the same bits in the input's memory, and no call that would need the input again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ACTIVATIONS, lay_out, same_bits
from torch import Tensor

import batchnorm
from batchnorm.kernels import cpu

BACKENDS = [
    None,
    "aten",
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())),
]
SHAPES = [(3, 5, 7, 9), (40, 6), (2, 3, 150, 149), (4, 300)]


def make_layer(channels: int, **options: Any) -> torch.nn.Module:
    layer = batchnorm.BatchNorm1d(channels, **options)
    layer._check_input_dim = lambda input: None  # type: ignore[method-assign]
    layer._checks_itself = True  # type: ignore[misc]
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer.eval()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_in_the_memory_of_the_input(
    backend: str | None, activation: str | None, dtype: torch.dtype, layout: str
) -> None:
    for shape in SHAPES:
        layer = make_layer(shape[1], activation=activation, backend=backend, dtype=dtype)
        x, other = (lay_out(torch.randn(shape).to(dtype), layout) for _ in range(2))
        mask = torch.rand(shape[0], *shape[2:]) < 0.7
        for residual, valid in ((None, None), (other, None), (other, mask)):
            given = lay_out(x, layout).clone() if layout != "sliced" else lay_out(x, layout)
            with torch.no_grad():
                expected = layer(given, residual, valid)
                address, version, strides = given.data_ptr(), given._version, given.stride()
                y = layer(given, residual, valid, inplace=True)
            assert y is given
            assert (y.data_ptr(), y.stride(), y.dtype) == (address, strides, dtype)
            assert y._version > version
            assert same_bits(y, expected)


def test_function() -> None:
    x = torch.randn(4, 3)
    expected = batchnorm.batch_norm(x, torch.zeros(3), torch.ones(3), activation="relu")
    assert batchnorm.batch_norm(x, torch.zeros(3), torch.ones(3), activation="relu", inplace=True) is x
    assert same_bits(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_in_the_memory_of_the_input(backend: str | None) -> None:
    layer = make_layer(3, activation="relu", backend=backend)
    memory = torch.randn(5 * 3 * 40 + 1)
    others: list[Callable[[], Tensor]] = [
        lambda: memory[1:].view(5, 3, 40),  # one element further
        lambda: memory[:-1].view(3, 5, 40).transpose(0, 1),  # in another order
        lambda: memory[:-1].view(5, 3, 40),  # itself
    ]
    with torch.no_grad():
        for make in others:
            saved = memory.clone()
            expected = layer(memory[:-1].view(5, 3, 40), make())
            assert same_bits(layer(memory[:-1].view(5, 3, 40), make(), inplace=True), expected)
            memory.copy_(saved)
        x = memory[:-1].view(5, 3, 40)
        expected = layer(x, x)
        assert same_bits(layer(x, x, inplace=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_that_the_input_has_changed(backend: str | None) -> None:
    a = torch.randn(4, 3, requires_grad=True)
    x = a.exp()  # its backward needs its output
    with torch.no_grad():
        make_layer(3, backend=backend)(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_inference_mode() -> None:
    layer = make_layer(3)
    with torch.inference_mode():
        x = torch.randn(4, 3)
        expected = layer(x)
        assert same_bits(layer(x, inplace=True), expected)
    with torch.no_grad(), pytest.raises(batchnorm.InputError, match="inference tensor outside"):
        layer(x, inplace=True)


def refused(fix: str, call: Callable[[], Any]) -> None:
    with pytest.raises(batchnorm.InputError, match="inplace=True") as info:
        call()
    assert fix in str(info.value)


def test_refused_where_the_input_is_needed_again() -> None:
    x = torch.randn(4, 3)
    layer = make_layer(3)
    refused("no_grad", lambda: layer(x, inplace=True))  # its weight requires a gradient
    bare = batchnorm.BatchNorm1d(3, affine=False)
    refused("eval()", lambda: bare(x, inplace=True))
    refused("eval()", lambda: batchnorm.BatchNorm1d(3, track_running_stats=False).eval()(x, inplace=True))
    bare.eval()
    for tensors in ((x.clone().requires_grad_(), None), (x, x.clone().requires_grad_())):
        refused("no_grad", lambda tensors=tensors: bare(*tensors, inplace=True))
    refused("compiler", lambda: torch.func.vmap(lambda v: bare(v, inplace=True))(torch.randn(2, 4, 3)))
    before = x.clone()
    assert bare(x, inplace=True) is x
    assert not torch.equal(x, before)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 3, 5).expand(4, 3, 5),
        torch.randn(4, 3, 1).expand(4, 3, 5),
        torch.randn(100).as_strided((4, 3, 5), (15, 4, 1)),
    ],
    ids=["batch", "positions", "strides"],
)
def test_refused_where_elements_share_memory(x: Tensor) -> None:
    before = x.clone()
    with torch.no_grad():
        refused("contiguous()", lambda: make_layer(3)(x, inplace=True))
    assert torch.equal(x, before)


def test_a_removed_layer_takes_it_too() -> None:
    model = batchnorm.remove(torch.nn.Sequential(batchnorm.BatchNorm1d(3, activation="relu"))).model
    x = torch.randn(4, 3)
    expected = x.relu()
    assert model[0](x, inplace=True) is x
    assert torch.equal(x, expected)

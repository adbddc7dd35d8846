"""Activation, residual and their gradients, in training and eval."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, EXACT, SLOPE, error, lay_out, leaf, oracle, same_bits
from torch import Tensor

import batchnorm
from batchnorm.kernels import cpu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXTRAS = list(itertools.product([False, True], repeat=2))  # with a residual, with a mask
MASK = torch.tensor([[1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 1, 1]], dtype=torch.bool)


def arguments(dtype: torch.dtype, residual: bool, masked: bool) -> dict[str, Any]:
    scale = torch.tensor([1.0, 3.0, 0.5]).reshape(3, 1)  # relu6 and hardswish are bent at 6 and ±3
    return {
        "input": (torch.randn(4, 3, 5) * 2 + 1).to(dtype),
        "weight": torch.tensor([2.0, -3.0, 0.7]).to(dtype),
        "bias": torch.tensor([1.0, 2.0, -0.5]).to(dtype),
        "residual": (torch.randn(4, 3, 5) * scale).to(dtype) if residual else None,
        "mask": MASK if masked else None,
    }


def call(given: dict[str, Any], running: tuple[Tensor, Tensor] | None, **options: Any) -> Tensor:
    options.setdefault("negative_slope", SLOPE)
    stats = (None, None) if running is None else running
    return batchnorm.batch_norm(
        given["input"], *stats, given["weight"], given["bias"], running is None,
        residual=given["residual"], mask=given["mask"], **options,
    )  # fmt: skip


def composition(
    given: dict[str, Any], running: tuple[Tensor, Tensor] | None, activation: str | None
) -> Tensor:
    """The same call in PyTorch's operators; the mask only where it does not change the statistics."""
    stats = (None, None) if running is None else running
    y = F.batch_norm(given["input"], *stats, given["weight"], given["bias"], running is None)
    y = y if given["residual"] is None else y + given["residual"]
    y = (
        F.leaky_relu(y, SLOPE)
        if activation == "leaky_relu"
        else getattr(F, activation or "identity", lambda z: z)(y)
    )
    return y if given["mask"] is None else torch.where(given["mask"].unsqueeze(1), y, 0)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("residual", "masked"), EXTRAS, ids=["plain", "mask", "residual", "residual-mask"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients(
    dtype: torch.dtype,
    activation: str | None,
    residual: bool,
    masked: bool,
    training: bool,
    backend: str | None,
) -> None:
    given = {
        name: leaf(value) if name != "mask" else value
        for name, value in arguments(dtype, residual, masked).items()
    }
    running = (
        None if training else (torch.tensor([0.5, -1, 2]).to(dtype), torch.tensor([1, 3, 0.25]).to(dtype))
    )
    dy = torch.randn(4, 3, 5).to(dtype)
    y = call(given, running, activation=activation, backend=backend)
    wanted = [name for name in ("input", "weight", "bias", "residual") if given[name] is not None]
    gradients = dict(zip(wanted, torch.autograd.grad(y, [given[name] for name in wanted], dy), strict=True))
    expected = oracle(
        given["input"], dy, weight=given["weight"], bias=given["bias"], residual=given["residual"],
        mask=given["mask"], activation=activation, running=running,
    )  # fmt: skip
    truth = {
        "input": expected.grad_input,
        "weight": expected.grad_weight,
        "bias": expected.grad_bias,
        "residual": expected.grad_residual,
    }
    room = dict.fromkeys(["output", *truth], EXACT[dtype])
    if activation == "gelu" and dtype == torch.float64:
        room = {name: 10 * value for name, value in room.items()}  # the oracle has erf in float64 only
    if backend is None and not (masked and training):
        # PyTorch's own composition rounds between batch norm, residual and activation: its error is the measure.
        # silu and gelu are PyTorch's operators on float32 here, too, in another order.
        factor = 3 if activation in ("silu", "gelu") else 1.5
        torchs = composition(given, running, activation)
        other = torch.autograd.grad(torchs, [given[name] for name in wanted], dy)
        room["output"] = max(room["output"], factor * error(torchs, expected.output))
        for name, value in zip(wanted, other, strict=True):
            room[name] = max(room[name], factor * error(value, truth[name]))
    assert y.dtype == dtype
    assert error(y, expected.output) <= room["output"]
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert error(gradient, truth[name]) <= room[name], name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("residual", "masked"), EXTRAS, ids=["plain", "mask", "residual", "residual-mask"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(
    activation: str | None, residual: bool, masked: bool, training: bool, backend: str
) -> None:
    if backend == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    given = arguments(torch.float64, residual, masked)
    mask = given.pop("mask")
    mask = None if mask is None else mask[:, :2] * torch.tensor([2.5, 1.0], dtype=torch.float64)
    for name in ("input", "residual"):
        given[name] = None if given[name] is None else given[name][:, :, :2]
    leaves = {name: leaf(value) for name, value in given.items() if value is not None}
    running = None if training else (torch.tensor([0.5, -1, 2]).double(), torch.tensor([1, 3, 0.25]).double())

    def function(*values: Tensor) -> Tensor:
        now = {"residual": None, "mask": mask} | dict(zip(leaves, values, strict=True))
        return call(now, running, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_gradgradcheck_in_slow_mode_of_the_plain_backend() -> None:
    x, weight, bias = (
        leaf(torch.randn(4, 2, dtype=torch.float64)),
        *map(leaf, torch.randn(2, 2, dtype=torch.float64)),
    )
    for training in (True, False):
        stats = (torch.zeros(2).double(), torch.ones(2).double())

        def function(
            x: Tensor, weight: Tensor, bias: Tensor, training: bool = training, stats: Any = stats
        ) -> Tensor:
            copies = [value.clone() for value in stats]
            return batchnorm.batch_norm(x, *copies, weight, bias, training)

        assert torch.autograd.gradcheck(function, (x, weight, bias))
        assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_is_the_function(activation: str | None, backend: str | None) -> None:
    layer = batchnorm.BatchNorm1d(3, activation=activation, negative_slope=SLOPE, backend=backend, eps=1e-3)
    given = arguments(torch.float32, True, True)
    with torch.no_grad():
        layer.weight.copy_(given["weight"])
        layer.bias.copy_(given["bias"])
    named = {"input": given["input"], "residual": given["residual"], "mask": MASK}
    running = (torch.zeros(3), torch.ones(3))
    for training in (True, False):
        layer.train(training)
        expected = batchnorm.batch_norm(
            given["input"], *running, given["weight"], given["bias"], training, 0.1, 1e-3, activation=activation,
            negative_slope=SLOPE, residual=given["residual"], mask=MASK, backend=backend,
        )  # fmt: skip
        y = layer(given["input"], given["residual"], MASK) if training else layer(**named)
        assert same_bits(y, expected)
    assert same_bits(layer.running_mean, running[0])
    assert same_bits(layer.running_var, running[1])


def test_activations_are_torchs() -> None:
    x = torch.randn(50, 3) * 4
    torchs = {
        "relu": F.relu,
        "relu6": F.relu6,
        "leaky_relu": F.leaky_relu,  # the default slope is torch's, too
        "silu": F.silu,
        "hardswish": F.hardswish,
        "gelu": F.gelu,
    }
    weight = torch.full((3,), 5.0)
    plain = F.batch_norm(x, None, None, weight, training=True)
    assert plain.max() > 6
    assert plain.min() < -3
    for name, function in torchs.items():
        for backend in (None, "reference"):
            y = batchnorm.batch_norm(x, None, None, weight, training=True, activation=name, backend=backend)
            torch.testing.assert_close(y, function(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("other", ["contiguous", "channels_last", "sliced", "expanded"])
def test_residual_and_gradient_in_another_layout(layout: str, other: str, backend: str | None) -> None:
    x = lay_out(torch.randn(3, 4, 5, 2), layout)
    residual, dy = (lay_out(torch.randn(3, 4, 5, 2), other) for _ in range(2))
    results = []
    for inputs in ((x, residual, dy), tuple(value.contiguous() for value in (x, residual, dy))):
        a, r = leaf(inputs[0]), leaf(inputs[1])
        y = batchnorm.batch_norm(a, None, None, training=True, activation="relu", residual=r, backend=backend)
        results.append((y, *torch.autograd.grad(y, [a, r], inputs[2])))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (2, 3, 4, 2, 3)], ids=str)
def test_memory_format_is_kept(
    shape: tuple[int, ...], training: bool, backend: str | None, layout: str
) -> None:
    fresh = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    memory_format = fresh if layout == "channels_last" else torch.contiguous_format
    x, residual, dy = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(3))
    for activation, r in itertools.product([None, "relu", "silu"], [None, residual]):
        a, b = leaf(x), leaf(r)
        stats = (torch.zeros(shape[1]), torch.ones(shape[1]))
        y = batchnorm.batch_norm(
            a, *stats, training=training, activation=activation, residual=b, backend=backend
        )
        wanted = [a] if b is None else [a, b]
        for tensor in (y, *torch.autograd.grad(y, wanted, dy)):
            assert tensor.is_contiguous(memory_format=memory_format), (activation, r is not None)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_residual_of_another_dtype(activation: str | None, training: bool, backend: str | None) -> None:
    x, r, dy = torch.randn(4, 3, 5).bfloat16(), torch.randn(4, 3, 5), torch.randn(4, 3, 5).bfloat16()
    running = None if training else (torch.zeros(3), torch.ones(3))
    a, b = leaf(x), leaf(r)
    y = call(
        {"input": a, "weight": None, "bias": None, "residual": b, "mask": None},
        running,
        activation=activation,
        backend=backend,
    )
    expected = oracle(x, dy, residual=r, activation=activation, running=running)
    dx, dr = torch.autograd.grad(y, [a, b], dy)
    assert (y.dtype, dx.dtype, dr.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    room = EXACT[torch.bfloat16] * (4 if backend is None else 1)
    for mine, truth in ((y, expected.output), (dx, expected.grad_input), (dr, expected.grad_residual)):
        assert error(mine, truth) <= room


def test_inputs_are_left_alone() -> None:
    given = arguments(torch.float32, True, True)
    copies = {name: value.clone() for name, value in given.items()}
    dy = torch.randn(4, 3, 5)
    kept = dy.clone()
    for backend, activation in itertools.product([None, "reference"], ["relu", "silu", None]):
        leaves = {name: leaf(value) if name != "mask" else value for name, value in given.items()}
        y = call(leaves, None, activation=activation, backend=backend)
        y.backward(dy)
        assert same_bits(dy, kept)
        for name, value in copies.items():
            assert same_bits(given[name], value), name


def test_in_place_change_of_the_input_is_noticed_before_backward() -> None:
    for backend in (None, "reference"):
        changed = leaf(torch.randn(4, 3)) * 1
        y = batchnorm.batch_norm(changed, None, None, training=True, backend=backend)
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_subclass_may_check_its_input_itself() -> None:
    class AnyRank(batchnorm.BatchNorm1d):
        def _check_input_dim(self, input: torch.Tensor) -> None:
            if input.dim() == 3:
                raise ValueError("not this one")

    layer = AnyRank(3)
    assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="not this one"):
        layer(torch.randn(2, 3, 4))

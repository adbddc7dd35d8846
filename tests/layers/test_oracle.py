"""The oracle itself, against PyTorch's autograd of the formula: a wrong oracle would bend every other test."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, SLOPE, error, lay_out, leaf, oracle, same_bits, ulps
from torch import Tensor

TORCH = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda z: F.leaky_relu(z, SLOPE),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    None: lambda z: z,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_oracle_is_torchs_formula(activation: str | None, training: bool) -> None:
    x, residual = (leaf(torch.randn(5, 3, 7, dtype=torch.float64) * 3 + 1) for _ in range(2))
    weight, bias = (leaf(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    running = (torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5)
    dy = torch.randn(5, 3, 7, dtype=torch.float64)
    normalized = F.batch_norm(x, *[r.clone() for r in running], weight, bias, training, 0.1, 1e-5)
    y = TORCH[activation](normalized + residual)
    gradients = torch.autograd.grad(y, [x, weight, bias, residual], dy)
    expected = oracle(
        x, dy, weight=weight, bias=bias, residual=residual, activation=activation,
        running=None if training else running,
    )  # fmt: skip
    assert error(y, expected.output) < 1e-13
    names = ("grad_input", "grad_weight", "grad_bias", "grad_residual")
    for name, gradient in zip(names, gradients, strict=True):
        assert error(gradient, getattr(expected, name)) < 1e-13, name


def test_oracle_takes_a_mask_as_frequencies() -> None:
    # Autograd through the formula with weights, written without the closed form.
    x, weight = leaf(torch.randn(6, 2, 5, dtype=torch.float64)), leaf(torch.randn(2, dtype=torch.float64))
    dy = torch.randn(6, 2, 5, dtype=torch.float64)
    mask = torch.tensor([0, 1, 3, 0, 2, 1.0]).reshape(6, 1)
    w = mask.double().reshape(6, 1, 1).expand(6, 1, 5)
    mean = (w * x).sum((0, 2), keepdim=True) / w.sum()
    var = (w * (x - mean) ** 2).sum((0, 2), keepdim=True) / w.sum()
    y = F.silu((x - mean) / (var + 1e-5).sqrt() * weight.reshape(1, 2, 1)) * (w > 0)
    gradients = torch.autograd.grad(y, [x, weight], dy)
    expected = oracle(x, dy, weight=weight, mask=mask, activation="silu")
    assert error(y, expected.output) < 1e-13
    assert error(gradients[0], expected.grad_input) < 1e-13
    assert error(gradients[1], expected.grad_weight) < 1e-13


def test_measures_see_a_wrong_value() -> None:
    x = torch.randn(4, 3, 5)
    expected = oracle(x, x).output
    wrong = torch.tensor(expected.astype("float32"))
    assert error(wrong, expected) < 1e-7
    wrong[1, 1, 1] += 1e-3
    assert 1e-4 < error(wrong, expected) < 1e-3
    one = torch.tensor([1.0])
    assert ulps(one, expected[:1, 0, 0] * 0 + 1) == 0
    assert ulps(torch.nextafter(one, one * 2), expected[:1, 0, 0] * 0 + 1) == 1
    assert same_bits(one * float("nan"), one * float("nan"))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(one, one.double())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts_keep_the_values(layout: str) -> None:
    x: Tensor = torch.randn(4, 3, 5, 6)
    laid = lay_out(x, layout)
    assert torch.equal(laid, x[:1].expand_as(x) if layout == "expanded" else x)
    assert laid.is_contiguous() == (layout == "contiguous")

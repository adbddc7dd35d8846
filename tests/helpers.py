"""The oracle of the layers' tests: batch norm's formulas in numpy's longdouble (64 bits of mantissa on x86).

Nothing here comes from the package: forward and backward are written down a second time, so that a mistake in one
of the two shows. `tests/layers/test_oracle.py` checks the oracle against PyTorch's autograd.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Real = np.longdouble
Array = np.ndarray

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")
# Those whose derivative is 0, 1 or the slope: a bit an element says which.
RELU_LIKE = ("relu", "relu6", "leaky_relu")
SLOPE = 0.2

# Relative to the largest value. Half types: half a unit in the last place of an output at the top of a binade.
EXACT = {
    torch.float64: 1e-14,
    torch.float32: 3e-7,
    torch.bfloat16: 2.0**-8 * 1.01,
    torch.float16: 2.0**-11 * 1.01,
}


@dataclass(frozen=True)
class Expected:
    """What a training or eval call and its backward give, each a longdouble array."""

    output: Array
    grad_input: Array
    grad_weight: Array
    grad_bias: Array
    grad_residual: Array
    mean: Array
    var: Array
    count: Array


def real(tensor: Tensor) -> Array:
    """The tensor's values without rounding."""
    return tensor.detach().to(torch.float64).cpu().numpy().astype(Real)


def _erf(z: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(z.astype(np.float64)).astype(Real)


def activate(z: Array, name: str | None, slope: float = SLOPE) -> tuple[Array, Array]:
    """The activation and its derivative at z, with PyTorch's choice at the kinks."""
    one = np.ones_like(z)
    zero = np.zeros_like(z)
    if name is None:
        return z, one
    if name == "relu":
        return np.where(z > 0, z, zero), np.where(z > 0, one, zero)
    if name == "relu6":
        return np.clip(z, 0, 6), np.where((z > 0) & (z < 6), one, zero)
    if name == "leaky_relu":
        return np.where(z > 0, z, z * Real(slope)), np.where(z > 0, one, one * Real(slope))
    if name == "silu":
        sigmoid = 1 / (1 + np.exp(-z))
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    if name == "hardswish":
        inner = (z > -3) & (z < 3)
        return z * np.clip(z + 3, 0, 6) / 6, np.where(inner, (2 * z + 3) / 6, np.where(z >= 3, one, zero))
    if name == "gelu":
        cdf = (1 + _erf(z / np.sqrt(Real(2)))) / 2
        return z * cdf, cdf + z * np.exp(-z * z / 2) / np.sqrt(2 * Real(math.pi))
    raise AssertionError(name)


def oracle(
    x: Tensor,
    dy: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float = SLOPE,
    running: tuple[Tensor, Tensor] | None = None,
) -> Expected:
    """Batch norm of one group; `running` (mean, var) stand in for the batch's statistics in eval.

    With frequencies w and n = Σw: μ = Σwx/n, σ² = Σw(x − μ)²/n, x̂ = (x − μ)/√(σ² + ε), y = act(γx̂ + β + r) where
    w > 0, else 0. With g = dy·act′: dx = γ/√(σ² + ε)·(g − w·(Σg + x̂·Σg·x̂)/n).
    """
    shape = tuple(x.shape)
    spread = (1, shape[1], *[1] * (len(shape) - 2))
    axes = tuple(i for i in range(len(shape)) if i != 1)
    w = np.ones(shape, Real)
    if mask is not None:
        w = np.broadcast_to(np.expand_dims(np.broadcast_to(real(mask), (shape[0], *shape[2:])), 1), shape)
    valid = w > 0

    def clean(tensor: Tensor) -> Array:
        return np.where(valid, real(tensor), Real(0))

    def per_channel(tensor: Tensor | None, default: float) -> Array:
        return (np.full(shape[1], Real(default)) if tensor is None else real(tensor)).reshape(spread)

    v = clean(x)
    n = w.sum(axes, keepdims=True)
    if running is None:
        mean = (w * v).sum(axes, keepdims=True) / n
        mean = mean + (w * (v - mean)).sum(axes, keepdims=True) / n
        var = (w * (v - mean) ** 2).sum(axes, keepdims=True) / n
    else:
        mean, var = per_channel(running[0], 0), per_channel(running[1], 1)
    gamma, beta = per_channel(weight, 1), per_channel(bias, 0)
    rstd = 1 / np.sqrt(var + Real(eps))
    xhat = (v - mean) * rstd
    z = xhat * gamma + beta + (0 if residual is None else clean(residual))
    y, slope_at = activate(z, activation, slope)
    g = np.where(valid, clean(dy) * slope_at, Real(0))
    sum_g = g.sum(axes, keepdims=True)
    if running is None:
        # Σw·x̂ = 0, so the mean of the gradient may go before it is multiplied: with offsets of 10⁷ in x and 10⁶ in dy
        # even 80 bits lose half their digits otherwise.
        e = g - w * sum_g / n
        e = e - w * e.sum(axes, keepdims=True) / n
        sum_gx = (e * xhat).sum(axes, keepdims=True)
        dx = gamma * rstd * (e - w * xhat * sum_gx / n)
    else:
        sum_gx = (g * xhat).sum(axes, keepdims=True)
        dx = gamma * rstd * g
    return Expected(
        output=np.where(valid, y, Real(0)),
        grad_input=dx,
        grad_weight=sum_gx.reshape(-1),
        grad_bias=sum_g.reshape(-1),
        grad_residual=g,
        mean=mean.reshape(-1),
        var=var.reshape(-1),
        count=n.reshape(-1),
    )


def moved(start: Tensor, batch: Array, momentum: float) -> Array:
    """A running statistic after one batch: (1 − momentum)·running + momentum·batch."""
    return (1 - Real(momentum)) * real(start) + Real(momentum) * batch


def error(actual: Tensor, expected: Array) -> float:
    """The largest deviation, relative to the largest expected value."""
    assert tuple(actual.shape) == expected.shape, (tuple(actual.shape), expected.shape)
    if expected.size == 0:
        return 0.0
    deviation = np.abs(real(actual) - expected)
    return float(deviation.max() / max(np.abs(expected).max(), np.finfo(Real).tiny))


def ulps(actual: Tensor, expected: Array) -> float:
    """The largest distance of a float32 tensor from the expected values, in units of their last place."""
    assert actual.dtype == torch.float32
    assert np.isfinite(expected).all()
    unit = np.spacing(np.abs(expected).astype(np.float32)).astype(Real)
    return float((np.abs(real(actual) - expected) / unit).max())


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit by bit, NaN included."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values (expanded: those of the first sample) in another memory layout."""
    x = x.detach()
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = x.new_full((x.shape[0] * 2, x.shape[1] + 2, *[size + 1 for size in x.shape[2:]]), float("nan"))
        view = wide[::2, 1:-1, *[slice(1, None)] * (x.dim() - 2)]
        view.copy_(x)
        return view
    if layout == "expanded":
        return x[:1].expand_as(x) if x.shape[0] else x
    raise AssertionError(layout)


def leaf(x: Tensor | None) -> Tensor | None:
    """A leaf that wants a gradient, in the memory layout of x."""
    return None if x is None else x.detach().requires_grad_()

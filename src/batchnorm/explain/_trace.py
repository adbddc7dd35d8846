"""`trace`: the four steps of batch norm as data, on the user's own array."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm._errors import InputError, InputTypeError, message
from batchnorm.explain._steps import LAWS, four_steps, listed
from batchnorm.report.document import Document
from batchnorm.report.reported import Reported

__all__ = ["Trace", "number", "trace"]

_SHOWN = 6


@dataclass(frozen=True, eq=False)
class Trace(Reported):
    """The four steps of batch norm on one batch, all numbers float64.

    Args:
        x: the input, (N,), (N, C) or (N, C, *S).
        mean: step 1, μ = Σx / n per channel, (C,).
        var: step 2, σ² = Σ(x − μ)² / n per channel, (C,); the biased variance, which normalization uses.
        xhat: step 3, x̂ = (x − μ) / √(σ² + ε), with the shape of `x`.
        y: step 4, γ·x̂ + β, with the shape of `x`.
        eps: ε.
        weight: γ, (C,).
        bias: β, (C,).
        count: n, the values in a channel.
        names: what the channels are called, C of them.

    Example:
        >>> import batchnorm
        >>> steps = batchnorm.trace([1.0, 2.0, 6.0], weight=2.0, bias=10.0, eps=1e-12)
        >>> steps.mean.item(), round(steps.var.item(), 6), steps.count
        (3.0, 4.666667, 3)
        >>> steps.y.round(decimals=3).tolist()
        [8.148, 9.074, 12.777]
    """

    kind: ClassVar[str] = "trace"
    schema_version: ClassVar[int] = 1

    x: Tensor
    mean: Tensor
    var: Tensor
    xhat: Tensor
    y: Tensor
    eps: float
    weight: Tensor
    bias: Tensor
    count: int
    names: tuple[str, ...]

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return len(self.mean)

    def channel(self, values: Tensor, index: int) -> list[float]:
        """All values of one channel of x, xhat or y, samples first, as a list."""
        column = values if values.dim() == 1 else values[:, index]
        numbers: list[float] = column.flatten().tolist()
        return numbers

    def document(self) -> Document:
        """The four steps with formula, numbers and picture, ready to be drawn for a terminal or a browser."""
        from batchnorm.explain._trace_document import tell  # it builds on this module

        return tell(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, in the shapes of the fields."""
        tensors = {
            name: getattr(self, name).tolist() for name in ("x", "mean", "var", "xhat", "y", "weight", "bias")
        }
        given = {"shape": list(self.x.shape), "count": self.count, "eps": self.eps, "names": list(self.names)}
        return {**given, **tensors}

    def __str__(self) -> str:
        lines = [f"batch norm of {self.count} values in {plural(self.channels, 'channel')}, ε = {self.eps:g}"]
        for index in range(min(self.channels, _SHOWN)):
            lines += self._lines(index)
        if self.channels > _SHOWN:
            lines.append(f"... and {self.channels - _SHOWN} more channels")
        return "\n".join(lines)

    def _lines(self, index: int) -> list[str]:
        x, xhat, y = (
            listed([number(value) for value in self.channel(values, index)], ", ", _SHOWN)
            for values in (self.x, self.xhat, self.y)
        )
        weight, bias = number(self.weight[index].item()), number(self.bias[index].item())
        return [
            f"{self.names[index]}: x = {x}",
            f"  1. mean             {LAWS[0]:<21} = {number(self.mean[index].item())}",
            f"  2. variance         {LAWS[1]:<21} = {number(self.var[index].item())}",
            f"  3. normalize        {LAWS[2]:<21}: {xhat}",
            f"  4. scale and shift  {LAWS[3]:<21}, γ = {weight}, β = {bias}: {y}",
        ]


def trace(input: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Trace:
    r"""The four steps of batch norm on a batch of your own: mean, variance, normalize, scale and shift.

    $$\mu = \tfrac1n \sum x, \quad \sigma^2 = \tfrac1n \sum (x - \mu)^2, \quad
    \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}, \quad y = \gamma \hat x + \beta$$

    This is what a batch-norm layer does in training, computed by the same operators in float64. Gradients are not
    followed.

    Args:
        input: the batch, (N,) for one channel, (N, C), or (N, C, *S) with statistics over N and S: a list, a NumPy
            array or a tensor of finite real numbers, at least two a channel.
        weight: γ, one number or (C,); None for 1.
        bias: β, one number or (C,); None for 0.
        eps: ε > 0, in the squared unit of the input.

    Returns:
        The steps as data; `print` shows them, `save` writes a page or JSON.

    Raises:
        InputError: a shape that does not fit, NaN or Inf, one value a channel, ε ≤ 0.
        InputTypeError: something that is no array of real numbers.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, algorithm 1.

    Example:
        >>> import batchnorm
        >>> print(batchnorm.trace([81, 84, 93], weight=3, bias=90))
        batch norm of 3 values in 1 channel, ε = 1e-05
        channel 0: x = 81, 84, 93
          1. mean             μ = Σx / n            = 86
          2. variance         σ² = Σ(x − μ)² / n    = 26
          3. normalize        x̂ = (x − μ) / √(σ² + ε): −0.98058, −0.392232, 1.37281
          4. scale and shift  y = γ·x̂ + β         , γ = 3, β = 90: 87.0583, 88.8233, 94.1184
    """
    x = _numbers(input, "input")
    if x.dim() == 0:
        raise InputError(
            message("input", got="a single number", expected="(N,), (N, C) or (N, C, *S) with N ≥ 2")
        )
    _check_eps(eps)
    view = x.unsqueeze(1) if x.dim() == 1 else x
    channels, count = view.shape[1], view.shape[0] * view.shape[2:].numel()
    if count < 2 or channels == 0:
        raise InputError(
            message(
                "input",
                got=f"shape {tuple(x.shape)}, {plural(count, 'value')} in {plural(channels, 'channel')}",
                expected="at least two values a channel",
                fix="One value is its own mean: what is left of it is 0.",
            )
        )
    gamma = _per_channel(weight, "weight", channels, 1.0)
    beta = _per_channel(bias, "bias", channels, 0.0)
    steps = four_steps(view, gamma, beta, float(eps))
    names = tuple(f"channel {index}" for index in range(channels))
    shaped = steps.xhat.reshape(x.shape), steps.y.reshape(x.shape)
    return Trace(x, steps.mean[0], steps.var[0], *shaped, float(eps), gamma, beta, count, names)


def number(value: float, digits: int = 6) -> str:
    """A number in at most `digits` digits, with a true minus sign.

    Example:
        >>> number(-1 / 3), number(-1 / 3, 3)
        ('−0.333333', '−0.333')
    """
    return f"{value:.{digits}g}".replace("-", "−")


def plural(count: int, noun: str) -> str:
    """`count` and its noun.

    Example:
        >>> plural(1, "channel"), plural(2, "channel")
        ('1 channel', '2 channels')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _numbers(value: Any, name: str) -> Tensor:
    """`value` as float64 on the CPU, finite and real; a copy, so that the trace stays what it was."""
    try:
        x = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        if x.dtype == torch.float32 and not hasattr(
            value, "dtype"
        ):  # of Python's floats, which hold more digits
            x = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        got = _kind(value)
        fix = "Rows must be of one length."
        raise InputTypeError(message(name, got=got, expected="an array of real numbers", fix=fix)) from error
    if x.is_complex() or x.dtype == torch.bool:
        got = f"dtype {str(x.dtype).removeprefix('torch.')}"
        raise InputTypeError(message(name, got=got, expected="real numbers"))
    x = x.to("cpu", torch.float64, copy=True)
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        got = f"{plural(bad, 'value')} that {'is' if bad == 1 else 'are'} NaN or infinite"
        raise InputError(message(name, got=got, expected="finite numbers", fix="Remove or fill them first."))
    return x


def _per_channel(value: Any, name: str, channels: int, default: float) -> Tensor:
    if value is None:
        return torch.full((channels,), default, dtype=torch.float64)
    given = _numbers(value, name)
    if given.dim() == 0:
        return given.expand(channels).clone()
    if given.shape != (channels,):
        raise InputError(
            message(
                name,
                got=f"shape {tuple(given.shape)}",
                expected=f"one number, or shape ({channels},), one a channel",
            )
        )
    return given


def _check_eps(eps: Any) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise InputTypeError(message("eps", got=type(eps).__name__, expected="a number above 0"))
    if not 0 < eps < float("inf"):
        raise InputError(message("eps", got=eps, expected="a finite number above 0", fix="1e-5 is usual."))


def _kind(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"

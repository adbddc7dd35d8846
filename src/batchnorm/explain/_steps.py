"""The four steps by the library's operators, and the same steps written out with numbers put in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

import batchnorm.ops  # noqa: F401 - registers the operators
from batchnorm.report.document import Formula

__all__ = ["LAWS", "NAMES", "Steps", "four_steps", "listed", "small", "worked"]

NAMES = ("The mean", "The variance", "Normalize", "Scale and shift")
LAWS = ("μ = Σx / n", "σ² = Σ(x − μ)² / n", "x̂ = (x − μ) / √(σ² + ε)", "y = γ·x̂ + β")


@dataclass(frozen=True, eq=False)
class Steps:
    """What the four steps give: mean and var (G, C), xhat and y with the input's shape, all float64."""

    mean: Tensor
    var: Tensor
    xhat: Tensor
    y: Tensor


def four_steps(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, groups: int = 1) -> Steps:
    """Run the library's forward operator on x (N, C, *S), float64; each of `groups` equal parts is a batch.

    The exact backend, whose error is the rounding of its output: these numbers are looked at.
    """
    forward: Callable[..., Any] = torch.ops.batchnorm.forward
    plain = (None, None, groups, eps, None, 0.0, "reference")
    xhat, mean, var, _, _ = forward(x, None, None, *plain)
    y = forward(x, weight, bias, *plain)[0]
    return Steps(mean, var, xhat, y)


def listed(values: Sequence[str], joint: str, limit: int = 5) -> str:
    """`values` in one line; of many, the first two and the last.

    Example:
        >>> listed(["1", "2", "3", "4", "5", "6"], " + ")
        '1 + 2 + … + 6'
    """
    if len(values) > limit:
        values = [*values[:2], "…", values[-1]]
    return joint.join(values)


def worked(
    values: Sequence[float],
    results: tuple[float, float, float, float],
    constants: tuple[float, float, float],
    number: Callable[[float], str],
    prefix: str = "",
    eps_digits: int = 6,
) -> tuple[Formula, Formula, Formula, Formula]:
    """The four formulas with the numbers of one batch of one channel; steps 3 and 4 for its first value.

    Args:
        values: the batch.
        results: its mean and variance; x̂ and y of its first value.
        constants: eps, γ and β.
        number: how a number is written.
        prefix: put before the ids, which must differ on one page.
        eps_digits: how many digits of ε are written.
    """
    (mean, var, xhat, y), (eps, weight, bias) = results, constants
    texts, safeguard = [number(value) for value in values], small(eps, eps_digits)
    squares = [f"({_minus(text, number(mean))})²" for text in texts]
    total = listed([f"({text})" if text.startswith("−") else text for text in texts], " + ")
    shown = (
        f"({total}) / {len(values)} = {number(mean)}",
        f"({listed(squares, ' + ')}) / {len(values)} = {number(var)}",
        f"first value: ({_minus(texts[0], number(mean))}) / √({number(var)} + {safeguard}) = {number(xhat)}",
        f"first value: {number(weight)} · {_bracket(number(xhat))} + {_bracket(number(bias))} = {number(y)}",
    )
    ids = ("mean", "variance", "normalize", "scale")
    first, second, third, fourth = (
        Formula(prefix + id_, law, line) for id_, law, line in zip(ids, LAWS, shown, strict=True)
    )
    return first, second, third, fourth


def small(eps: float, digits: int = 6) -> str:
    """ε in at most so many digits, in plain decimals where that stays short.

    Example:
        >>> small(1e-5), small(10**-4.75, 2), small(1e-12)
        ('0.00001', '0.000018', '1e-12')
    """
    text = f"{eps:.{digits}g}"
    return text if eps < 1e-6 else f"{Decimal(text):f}"


def _minus(left: str, right: str) -> str:
    return f"{left} − {_bracket(right)}"


def _bracket(text: str) -> str:
    return f"({text})" if text.startswith("−") else text
